"""Where slots and text tokens sit for the rotary embedding: (row, column, time), and the angles that follow.

The released layout scales rows and columns so that any grid covers a square of side `scale`, lays text out along the time axis
over the same length, and counts frames in whole numbers. Positions belong to slots, whatever token a slot carries.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


def grid_positions(frames: int, rows: int, columns: int, scale: int) -> Float[Tensor, "tokens 3"]:
    """Positions of the slots of a video, frame by frame in raster order, in float64."""
    unit = scale / math.sqrt(rows * columns)
    time, row, column = torch.meshgrid(*(torch.arange(n).double() for n in (frames, rows, columns)), indexing="ij")
    return torch.stack([row * unit, column * unit, time], dim=-1).flatten(0, 2)


def text_positions(length: int, scale: int) -> Float[Tensor, "length 3"]:
    """Positions of text tokens, on the time axis, in float64."""
    time = torch.arange(length).double() / length * scale
    return torch.stack([torch.zeros_like(time), torch.zeros_like(time), time], dim=-1)


@lru_cache(maxsize=8)
def slot_turns(
    frames: int, grid: tuple[int, int], scale: int, text: int, head_dim: int, device: torch.device
) -> Float[Tensor, "l two p"]:
    """Cosines and sines of a video's slots, after those of `text` text tokens; made once, for a stream asks at every frame."""
    with torch.inference_mode(False):  # else they could not be used in training, where inference asked first
        positions = torch.cat([text_positions(text, scale), grid_positions(frames, *grid, scale)])
        return turns(positions, head_dim).to(device)


def turns(positions: Float[Tensor, "l 3"], head_dim: int) -> Float[Tensor, "l two p"]:
    """Cosines and sines of every position: 3/8 of the pairs for the row, 3/8 for the column, 1/4 for time; base 10000."""
    groups = zip(positions.double().unbind(-1), (3 * head_dim // 16, 3 * head_dim // 16, head_dim // 8), strict=True)
    angles = torch.cat([p[:, None] * 10000.0 ** (-torch.arange(n).double() / n) for p, n in groups], dim=-1)
    return torch.stack([angles.cos(), angles.sin()], dim=-2).float()
