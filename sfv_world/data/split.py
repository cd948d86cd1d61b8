"""Which split of a recording worlds and codecs were trained with: what begins with them must hold out what they did."""

from collections.abc import Mapping
from typing import Any


def common_split(parents: Mapping[str, Mapping[str, Any]], data: Mapping[str, Any]) -> dict[str, Any]:
    """The `seed`, `held_out` and `episodes` that parents split a recording by, as far as they say.

    Args:
        parents: what is said about worlds and codecs, by the option that names each. Those of other recordings have no part in it.
        data: what the recording says of itself.

    Raises:
        ValueError: if two of them split it otherwise: each was trained on episodes that the other held out.
    """
    common: dict[str, Any] = {}
    agreed: list[str] = []
    for option, about in parents.items():
        recording, training = recording_of(about.get("data") or {}), about.get("training") or {}
        if recording is None or recording != recording_of(data):
            continue
        theirs = {name: training[name] for name in ("seed", "held_out", "episodes") if training.get(name) is not None}
        if any(common.get(name, value) != value for name, value in theirs.items()):
            raise ValueError(
                f"{option}: expected the split that {' and '.join(agreed)} was trained with on the same recording, "
                f"{as_options(common)}, got {as_options(theirs)}: each knows episodes that the other held out. Train one anew "
                "with the other's."
            )
        common |= theirs
        agreed.append(option)
    return common


def as_options(split: Mapping[str, Any]) -> str:
    """A split as commands take it."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in split.items())


def recording_of(data: Mapping[str, Any]) -> Any:
    """What tells a recording from others, if anything does: its recipe decides every episode, in whatever folder."""
    return data.get("recipe") or data.get("dataset_id")
