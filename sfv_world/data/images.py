"""What counts as an image observation: agreed between environments, recordings and their readers."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

REPEATED_SCREEN = "repeated_screen"
"""Key in `info`: this observation is the previous screen again, because the game had none to show."""

SMALLEST = 8
"""Pixels of an image's side, at least: a patch."""

IMAGE_KEYS = ("screen", "image", "pixels")
"""Keys under which a `Dict` observation may hold its image, in order of preference."""


def image_key(space: gym.Space[Any]) -> str | None:
    """Says where an observation space holds its image: "" for the space itself, a key of a `Dict`, or None for nowhere.

    An image is a uint8 `Box` over [0, 255] of shape (H, W), (H, W, 1) or (H, W, 3), at least `SMALLEST` pixels a side.
    """
    if isinstance(space, spaces.Dict):
        return next((key for key in IMAGE_KEYS if key in space.spaces and image_key(space[key]) == ""), None)
    is_image = (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and (len(space.shape) == 2 or (len(space.shape) == 3 and space.shape[2] in (1, 3)))
        and min(space.shape[:2]) >= SMALLEST
        and bool((space.low == 0).all() and (space.high == 255).all())
    )
    return "" if is_image else None
