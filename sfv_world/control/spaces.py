"""Batches of actions of any Gymnasium space, checked and flattened to vectors.

Discrete parts become one-hot, bounded boxes are scaled to [-1, 1], unbounded ones pass a symmetric logarithm. The
vectorised counterpart of `gymnasium.spaces.flatten`, with values a network likes.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from gymnasium import spaces
from jaxtyping import Float32

from sfv_world.transfer import to_host


def action_size(space: spaces.Space[Any]) -> int:
    """Length of the vector that `flatten_actions` makes of one action."""
    match space:
        case spaces.Discrete():
            return int(space.n)
        case spaces.MultiDiscrete():
            return int(space.nvec.sum())
        case spaces.MultiBinary() | spaces.Box():
            return int(np.prod(space.shape))
        case spaces.Dict():
            return sum(map(action_size, space.spaces.values()))
        case spaces.Tuple():
            return sum(map(action_size, space.spaces))
    raise ValueError(
        f"action space: expected Discrete, MultiDiscrete, MultiBinary, Box, or a Dict or Tuple of those, got {space}. "
        "Wrap the environment in gymnasium.wrappers.TransformAction to give it one of them."
    )


def flatten_actions(
    space: spaces.Space[Any], actions: Any, batch: tuple[int, ...], name: str = "actions"
) -> Float32[np.ndarray, "*b n"]:
    """Actions with leading dimensions `batch` -> vectors.

    Args:
        space: the space of one action.
        actions: an array, list or tensor of `batch + space.shape`; for Dict and Tuple, a dict or tuple of such. They are
            read on the host: a tensor on a device is waited for.
        batch: leading dimensions.
        name: how error messages call the actions.

    Raises:
        ValueError: if the structure, shape, type or range is not the space's, or a value is NaN.
    """
    match space:
        case spaces.Dict():
            if not isinstance(actions, dict) or set(actions) != set(space.spaces):
                got = sorted(map(str, actions)) if isinstance(actions, dict) else type(actions).__name__
                raise ValueError(f"{name}: expected a dict with the keys {sorted(space.spaces)}, got {got}.")
            parts = [flatten_actions(s, actions[k], batch, f"{name}[{k!r}]") for k, s in space.spaces.items()]
            return np.concatenate(parts, axis=-1)
        case spaces.Tuple():
            if not isinstance(actions, tuple | list) or len(actions) != len(space.spaces):
                raise ValueError(f"{name}: expected a tuple of {len(space.spaces)} parts, got {actions!r}.")
            parts = [
                flatten_actions(s, a, batch, f"{name}[{i}]")
                for i, (s, a) in enumerate(zip(space.spaces, actions, strict=True))
            ]
            return np.concatenate(parts, axis=-1)
    array = to_host(actions, name)
    if array.shape != batch + (space.shape or ()):
        raise ValueError(f"{name}: expected shape {batch + (space.shape or ())} for {space}, got {array.shape}.")
    match space:
        case spaces.Discrete():
            offsets = _integers(array, space.start, space.start + space.n, space, name) - space.start
            return np.eye(space.n, dtype=np.float32)[offsets]
        case spaces.MultiDiscrete():
            low = np.asarray(space.start)
            offsets = _integers(array, low, low + space.nvec, space, name) - low
            hot = [
                np.eye(n, dtype=np.float32)[o] for n, o in zip(space.nvec.flat, _columns(offsets, batch), strict=True)
            ]
            return np.concatenate(hot, axis=-1)
        case spaces.MultiBinary():
            return _integers(array, 0, 2, space, name).reshape(*batch, action_size(space)).astype(np.float32)
        case spaces.Box():
            return _box(array, space, name).reshape(*batch, action_size(space))
    raise ValueError(f"{name}: {space} is not a space of actions that controls can be made of.")


def map_actions(function: Callable[[np.ndarray], np.ndarray], space: spaces.Space[Any], actions: Any) -> Any:
    """Applies a function to every array of an action tree; a part of another structure than the space's stays as it is."""
    match space:
        case spaces.Dict() if isinstance(actions, dict) and actions.keys() == space.spaces.keys():
            return {name: map_actions(function, part, actions[name]) for name, part in space.spaces.items()}
        case spaces.Tuple() if isinstance(actions, tuple | list) and len(actions) == len(space.spaces):
            return tuple(map_actions(function, s, a) for s, a in zip(space.spaces, actions, strict=True))
        case spaces.Dict() | spaces.Tuple():
            return actions  # `flatten_actions` says so
    return function(to_host(actions, "actions"))


def _columns(array: np.ndarray, batch: tuple[int, ...]) -> list[np.ndarray]:
    return list(np.moveaxis(array.reshape(*batch, math.prod(array.shape[len(batch) :])), -1, 0))


def _integers(array: np.ndarray, low: Any, high: Any, space: spaces.Space[Any], name: str) -> np.ndarray:
    if array.dtype.kind not in "iub" and array.size:
        raise ValueError(f"{name}: expected integers for {space}, got dtype {array.dtype}.")
    if ((array < low) | (array >= high)).any():
        raise ValueError(f"{name}: expected values inside {space}, got values from {array.min()} to {array.max()}.")
    return array.astype(np.int64)


def _box(array: np.ndarray, space: spaces.Box, name: str) -> Float32[np.ndarray, "..."]:
    if array.dtype.kind not in "iufb":
        raise ValueError(f"{name}: expected numbers for {space}, got dtype {array.dtype}.")
    with np.errstate(over="ignore"):  # all as float32 has it: 0.7 is inside a float32 box that ends at 0.7
        array, low, high = (x.astype(np.float32).astype(np.float64) for x in (array, space.low, space.high))
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: expected finite numbers, got NaN or infinity.")
    if ((array < low) | (array > high)).any():
        raise ValueError(f"{name}: expected values inside {space}, got values from {array.min()} to {array.max()}.")
    bounded = space.bounded_below & space.bounded_above
    low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
    scaled = 2 * (array - low) / np.maximum(high - low, 1e-12) - 1
    return np.where(bounded, scaled, np.sign(array) * np.log1p(np.abs(array))).astype(np.float32)
