"""Begins a world's training at the weights of another (`--init`)."""

from dataclasses import replace
from pathlib import Path

import torch

from sfv_world.checkpoint import load_model
from sfv_world.model import WorldModel


def inherit(model: WorldModel, folder: Path, codec: Path | None, device: str) -> dict[str, int | float]:
    """Gives `model`, a world of `codec`, the weights of the world in `folder`; tells how long that was trained in all.

    The shallow flow begins anew where it has other bands, the denoiser where one of the two has none; window and groups may differ.

    Raises:
        ValueError: if the worlds differ in anything else.
    """
    shape, (before, about) = model.config, load_model(folder, device)
    deep = replace(before.config.flow.deep, window=shape.flow.deep.window)
    weights, theirs = (
        before.state_dict(),
        replace(before.config, flow=replace(before.config.flow, deep=deep, groups=shape.flow.groups)),
    )
    if theirs.codec == shape.codec and theirs.flow.bands != shape.flow.bands:
        weights = {name: w for name, w in weights.items() if not name.startswith("flow.shallow.")}
        theirs = replace(theirs, flow=replace(theirs.flow, bands=shape.flow.bands))
    if None in (theirs.denoiser, shape.denoiser):
        weights = {name: w for name, w in weights.items() if not name.startswith("denoiser.")}
        theirs = replace(theirs, denoiser=shape.denoiser)
    if (theirs, before.action_space) != (shape, model.action_space):
        raise ValueError(
            f"init: expected a world of the shape {shape} for actions {model.action_space}, got {before.config} "
            f"for {before.action_space}. Choose the preset, kind, window, codec, patch and noise it was trained with."
        )
    mine = model.state_dict()
    if any(not torch.equal(w, mine[name]) for name, w in weights.items() if name.startswith("codec.autoencoder.")):
        raise ValueError(f"init: expected a world of the codec {codec}, got one of another. Choose the codec it has.")
    model.load_state_dict(mine | weights)
    earlier = about.get("before") or {}
    return {name: about.get(name, 0) + earlier.get(name, 0) for name in ("steps", "minutes")}
