"""The pixel codec: uint8 frames to tokens of patches, and back.

Each patch becomes one token. Its pixels, dequantised to [-1, 1], are turned by a fixed orthonormal cosine transform
(rows, columns and colours) and scaled per channel. The flow predicts one mean and scale per channel, independent
given the past; what is left unpredicted in a patch is smooth, so cosine coefficients are closer to independent
than pixels are. Channels go from coarse to fine. The transform's constant Jacobian is part of the likelihood.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sfv_world.codec.tokens import Codec

CELL = 1 - 2**-16  # how much of a value's cell is used: float32 would round its very end into the next one


@dataclass(frozen=True)
class PixelCodecConfig:
    """Geometry of the pixel codec."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    height: int = 64
    """Rows of a frame, in pixels."""
    width: int = 64
    """Columns of a frame, in pixels."""
    patch: int = 8
    """Side of a square patch, in pixels: one token."""
    cosine: bool = True
    """Cosine coefficients (True) or raw pixels (False) as the channels of a token."""

    def __post_init__(self) -> None:
        if self.patch < 1 or self.height % self.patch or self.width % self.patch:
            size = f"{self.height} x {self.width}"
            raise ValueError(f"patch must divide height and width, got patch {self.patch} for frames of {size}")

    @property
    def signal(self) -> tuple[int, int, int]:
        """Rows, columns and colours of a frame."""
        return self.height, self.width, 3

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // self.patch, self.width // self.patch

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return 3 * self.patch**2


def cosine_matrix(size: int) -> Float[Tensor, "size size"]:
    """The orthonormal DCT-II of `size` points; row k is frequency k."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)
    matrix = math.sqrt(2 / size) * torch.cos(math.pi * k * (2 * n + 1) / (2 * size))
    matrix[0] /= math.sqrt(2)
    return matrix


def coarse_to_fine(patch: int) -> Int[Tensor, "c"]:
    """The order of a patch's cosine coefficients (row, column, colour), as counted there, by spatial frequency."""
    row, column, colour = torch.meshgrid(torch.arange(patch), torch.arange(patch), torch.arange(3), indexing="ij")
    frequency = (row + column) * patch + torch.maximum(row, column)
    return torch.argsort((frequency * 3 + colour).flatten(), stable=True)


class PixelCodec(Codec):
    """Frames (..., H, W, 3) uint8 <-> tokens (..., L, C) float32; the signal is the pixels, in [-1, 1]."""

    def __init__(self, config: PixelCodecConfig):
        transform = torch.eye(config.channels, dtype=torch.float64)
        if config.cosine:
            space, colour = cosine_matrix(config.patch), cosine_matrix(3)
            transform = torch.kron(torch.kron(space, space), colour)[coarse_to_fine(config.patch)]
        super().__init__(config, transform, learned=False)

    def signal(
        self, frames: UInt8[Tensor, "*b h w 3"], uniform: Float[Tensor, "*b h w 3"] | float = 0.5
    ) -> Float[Tensor, "*b h w 3"]:
        """Dequantised pixels in [-1, 1]; `uniform` in [0, 1) is where in its cell each value lies."""
        return (frames.float() + CELL * uniform) / 128 - 1

    def noise_log_density(
        self, noised: Float[Tensor, "*b h w 3"], frames: UInt8[Tensor, "*b h w 3"], noise: float
    ) -> Float[Tensor, "*b"]:
        """log q(noised pixels | frame): of normal noise and of where in its cell each value lies, together."""
        low = self.signal(frames, 0.0).double()
        below, above = ((edge - noised) / noise for edge in (low, low + CELL / 128))
        density = (torch.special.ndtr(above) - torch.special.ndtr(below)) * 128 / CELL
        return density.log().sum((-1, -2, -3)).to(noised.dtype)

    def frames(self, signal: Float[Tensor, "*b h w 3"]) -> UInt8[Tensor, "*b h w 3"]:
        """Pixels in [-1, 1] -> the uint8 frame whose cell they lie in."""
        return ((signal + 1) * 128).floor().clamp(0, 255).byte()
