"""Begins a world's training at the weights of another (`--init`)."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from sfv_world.checkpoint import CONFIG, MODEL, fitting, load_model, read_world
from sfv_world.loading import find_world
from sfv_world.model import ModelConfig, WorldModel
from sfv_world.released.adapted import AdaptedConfig, AdaptedModel


def inherit(model: WorldModel, folder: Path, codec: Path | None, device: str) -> dict[str, int | float]:
    """Gives `model`, a world of `codec`, the weights of the world in `folder`; tells how long that was trained in all.

    The shallow flow begins anew where it has other bands that are no parts of theirs, the denoiser where one of the two has none,
    what actions mean where there are others; window, groups and bins may differ.

    Raises:
        ValueError: if the worlds differ in anything else.
    """
    shape, (before, about) = model.config, load_model(find_world(folder), device)
    now, then, weights = shape.flow, before.config.flow, before.state_dict()
    flow = replace(then, deep=replace(then.deep, window=now.deep.window))
    if before.config.codec == shape.codec:
        flow = replace(flow, bands=now.bands, groups=now.groups, bins=now.bins)
        if (then.bands, then.bins) != (now.bands, now.bins):
            weights = _of_bands(weights, then.bands, now.bands)
    theirs = replace(before.config, flow=flow)
    if None in (theirs.denoiser, shape.denoiser):
        weights = {name: w for name, w in weights.items() if not name.startswith("denoiser.")}
        theirs = replace(theirs, denoiser=shape.denoiser)
    if before.action_space != model.action_space:
        weights = {name: w for name, w in weights.items() if not name.startswith("controls.project.")}
    if theirs != shape:
        mine, other = (_flat(TypeAdapter(ModelConfig).dump_python(config)) for config in (shape, theirs))
        differ = [f"{name} {value} (here {mine.get(name)})" for name, value in other.items() if mine.get(name) != value]
        raise ValueError(
            f"init: expected a world of this one's shape, got {folder} with {', '.join(differ)}. Choose the preset, kind, window, "
            "codec, patch and noise it was trained with, and a recording of its frame size."
        )
    mine = model.state_dict()
    if any(not torch.equal(w, mine[name]) for name, w in weights.items() if name.startswith("codec.autoencoder.")):
        raise ValueError(f"init: expected a world of the codec {codec}, got one of another. Choose the codec it has.")
    model.load_state_dict(mine | weights)
    return _trained(about)


def inherit_adapter(model: AdaptedModel, folder: Path) -> dict[str, int | float]:
    """Gives `model` the adapter, control encoder and heads of the world in `folder`; tells how long they were trained in all.

    What actions mean begins anew where there are others.

    Raises:
        ValueError: if that world is on another released model.
    """
    config, action_space, about = read_world(folder, AdaptedConfig)
    if config.fingerprint != model.config.fingerprint:
        raise ValueError(
            f"init: expected a world on the released model that {folder} was trained on (checksum {config.fingerprint}), found "
            f"another in its place (checksum {model.config.fingerprint}). Name its place in {folder / CONFIG}."
        )
    weights = fitting(folder / MODEL, lambda: AdaptedModel(config, action_space, model.backbone), "cpu")
    other = ("text", "unconditional", *(["controls.project."] if action_space != model.action_space else []))
    mine = model.state_dict()
    model.load_state_dict(mine | {name: w for name, w in weights.items() if not name.startswith(other)})
    return _trained(about)


def _trained(about: dict[str, Any]) -> dict[str, int | float]:
    """How long a world was trained, with all that it began with."""
    earlier = about.get("before") or {}
    return {name: about.get(name, 0) + earlier.get(name, 0) for name in ("steps", "minutes")}


def _flat(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    """All values of a nested configuration by their whole names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{lead}{name}.") if isinstance(value, dict) else {f"{lead}{name}": value}
    return found


def _of_bands(weights: dict[str, Tensor], before: tuple[int, ...], now: tuple[int, ...]) -> dict[str, Tensor]:
    """Weights for other bands and curves: each band begins as the one it is part of, if all of them are, each curve straight."""
    blocks = "flow.shallow.blocks."
    kept: dict[str, Tensor] = {}
    wholes = [slice(end - size, end) for size, end in zip(before, accumulate(before), strict=True)]
    for index, (size, end) in enumerate(zip(now, accumulate(now), strict=True)):
        start = end - size
        whole = next((k for k, band in enumerate(wholes) if band.start <= start and end <= band.stop), None)
        if whole is None:
            kept = {}
            break
        part = slice(start - wholes[whole].start, end - wholes[whole].start)
        for name, w in weights.items():
            if name.startswith(f"{blocks}{whole}."):
                if ".proj_out." in name:  # scales of all channels, then means
                    w = w.unflatten(0, (2, before[whole]))[:, part].flatten(0, 1)
                kept[name.replace(f"{blocks}{whole}.", f"{blocks}{index}.")] = w
    return {name: w for name, w in weights.items() if not name.startswith("flow.shallow.")} | kept
