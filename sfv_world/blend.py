"""`sfv-world blend`: a world between two of which one began with the other's weights.

What a world is tuned for, it may overdo. Between it and the one it began with lie worlds whose frames are as likely, and which
keep of both what each does better (WiSE-FT, arXiv 2109.01903).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from sfv_world.checkpoint import CONFIG, STARTS, check_vacant, load_model, load_tensors, save_model, save_tensors
from sfv_world.data.split import common_split
from sfv_world.loading import find_world


@dataclass(frozen=True)
class BlendConfig:
    """Which worlds to blend."""

    world: Path
    """Name of a shipped world, or a folder; start frames and what is said about it are kept."""
    other: Path
    """Another one of the same shape."""
    out: Path
    """Folder of the new world."""
    share: float = 0.5
    """Part of the other's weights in it."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share: expected more than 0 and less than 1, got {self.share}.")


def blend(config: BlendConfig) -> Path:
    """Writes the world of the weighted means of all weights.

    Raises:
        ValueError: if the worlds differ in more than weights, held out other episodes of one recording, or there is one in `out`.
    """
    check_vacant(config.out, "world", CONFIG)
    folder = find_world(config.world)
    (model, about), (other, said) = load_model(folder), load_model(find_world(config.other))
    mine, theirs = model.state_dict(), other.state_dict()
    same = (model.config, model.action_space) == (other.config, other.action_space)
    if not same or any(not torch.equal(w, theirs[name]) for name, w in mine.items() if name.startswith("codec.")):
        raise ValueError(
            f"other: expected a world of the shape, actions and codec of {config.world}, got {config.other}, which differs. Train "
            "one from the other (`sfv-world train --init`)."
        )
    common_split({"world": about, "other": said}, about.get("data") or {})
    share = config.share
    means = {name: (1 - share) * w.double() + share * theirs[name].double() for name, w in mine.items()}
    model.load_state_dict(means)
    if (folder / STARTS).exists():
        save_tensors(config.out / STARTS, *load_tensors(folder / STARTS))
    save_model(config.out, model, {**about, "blended": {"other": str(config.other), "share": share}})
    print(f"wrote {config.out}: {1 - share:.0%} of {config.world} and {share:.0%} of {config.other}")
    return config.out
