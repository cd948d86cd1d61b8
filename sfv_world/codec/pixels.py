"""The pixel codec: uint8 frames to tokens of patches, and back.

Each patch becomes one token. Its pixels, dequantised to [-1, 1], are turned by a fixed orthonormal cosine transform
(rows, columns and colours) and scaled per channel. The flow predicts one mean and scale per channel, independent
given the past; what is left unpredicted in a patch is smooth, so cosine coefficients are closer to independent
than pixels are. Channels go from coarse to fine. The transform's constant Jacobian is part of the likelihood.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

CELL = 1 - 2**-16  # how much of a value's cell is used: float32 would round its very end into the next one


@dataclass(frozen=True)
class PixelCodecConfig:
    """Geometry of the pixel codec."""

    height: int = 64
    """Rows of a frame, in pixels."""
    width: int = 64
    """Columns of a frame, in pixels."""
    patch: int = 8
    """Side of a square patch, in pixels: one token."""
    cosine: bool = True
    """Cosine coefficients (True) or raw pixels (False) as the channels of a token."""

    def __post_init__(self) -> None:
        if self.height % self.patch or self.width % self.patch:
            size = f"{self.height} x {self.width}"
            raise ValueError(f"patch must divide height and width, got patch {self.patch} for frames of {size}")

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


class PixelCodec(nn.Module):
    """Frames (..., H, W, 3) uint8 <-> tokens (..., L, C) float32, L patches in raster order."""

    transform: Tensor
    scale: Tensor

    def __init__(self, config: PixelCodecConfig):
        super().__init__()
        self.config = config
        transform = torch.eye(config.channels, dtype=torch.float64)
        if config.cosine:
            space, colour = cosine_matrix(config.patch), cosine_matrix(3)
            transform = torch.kron(torch.kron(space, space), colour)[coarse_to_fine(config.patch)]
        self.register_buffer("transform", transform.float(), persistent=False)
        self.register_buffer("scale", torch.ones(config.channels))

    @property
    def log_det(self) -> Float[Tensor, ""]:
        """log|det d(tokens)/d(pixels)| of one frame, in nats; pixels in [-1, 1]."""
        rows, columns = self.config.grid
        return -rows * columns * self.scale.log().sum()

    def fit(self, frames: UInt8[Tensor, "n h w 3"], noise: float) -> None:
        """Sets the scale of every channel to its standard deviation over `frames`, noise included."""
        pixels = self._patches(self.pixels(frames)) @ self.transform.T
        self.scale.copy_((pixels.flatten(0, -2).var(0) + noise**2).sqrt())

    def pixels(
        self, frames: UInt8[Tensor, "*b h w 3"], uniform: Float[Tensor, "*b h w 3"] | float = 0.5
    ) -> Float[Tensor, "*b h w 3"]:
        """Dequantised pixels in [-1, 1]; `uniform` in [0, 1) is where in its cell each value lies."""
        return (frames.float() + CELL * uniform) / 128 - 1

    def encode(self, pixels: Float[Tensor, "*b h w 3"]) -> Float[Tensor, "*b l c"]:
        """Pixels in [-1, 1] -> tokens."""
        return self._patches(pixels) @ self.transform.T / self.scale

    def decode(self, tokens: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b h w 3"]:
        """Tokens -> pixels in [-1, 1] (not clipped): the inverse of `encode`."""
        rows, columns = self.config.grid
        patches = (tokens * self.scale) @ self.transform
        return rearrange(patches, "... (r c) (i j k) -> ... (r i) (c j) k", r=rows, c=columns, i=self.config.patch, k=3)

    def frames(self, pixels: Float[Tensor, "*b h w 3"]) -> UInt8[Tensor, "*b h w 3"]:
        """Pixels in [-1, 1] -> the uint8 frame whose cell they lie in."""
        return ((pixels + 1) * 128).floor().clamp(0, 255).byte()

    def _patches(self, pixels: Tensor) -> Tensor:
        patch = self.config.patch
        return rearrange(pixels, "... (r i) (c j) k -> ... (r c) (i j k)", i=patch, j=patch)
