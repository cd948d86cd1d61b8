"""The latent codec: frames to the latents of a small convolutional autoencoder, and back.

Every frame stands alone. A variational autoencoder (arXiv 1312.6114) with a posterior of fixed width: its means have mean 0
and variance 1 in every channel by construction, the decoder reads them with normal noise of `noise` added. The KL to
N(0, 1) is then the same whatever the weights, noise^2 / 2 - log(noise) nats a latent on average, and needs no weight; and
the decoder is trained on just what a world with that noise hands it. It takes the noise out as well as it can, so the
frames of a latent world look clean.

A world's density is that of the noised latents. The decoder has no part in it: it cannot be inverted.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sfv_world.codec.tokens import Codec, in_batches
from sfv_world.codec.vae import to_frames, to_pixels


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    height: int = 64
    """Rows of a frame, in pixels."""
    width: int = 64
    """Columns of a frame, in pixels."""
    space: int = 8
    """Side of the square of pixels that a place of the latents stands for: 2, 4, 8, ..."""
    latents: int = 16
    """Latents of a place."""
    base: int = 96
    """Channels of its deepest layers: the one dial of its size; each finer stage has half of them. About 0.5 million parameters."""
    noise: float = 0.3
    """Standard deviation of the noise on latents, which have variance 1."""

    def __post_init__(self) -> None:
        if self.space < 2 or self.space & (self.space - 1):
            raise ValueError(f"space: expected a power of two from 2 on, got {self.space}.")
        if self.height % self.space or self.width % self.space:
            size = f"{self.height} x {self.width}"
            raise ValueError(f"space: expected a divisor of height and width, got {self.space} for frames of {size}.")
        if self.base < 1 or self.base % (8 * self.space // 2):
            raise ValueError(
                f"base: expected a multiple of {8 * self.space // 2}, so that the finest stage has eight channels or more, "
                f"got {self.base}."
            )
        if self.latents < 1 or not self.noise >= 0:
            raise ValueError(f"latents, noise: expected at least 1 and 0, got {self.latents} and {self.noise}.")


class Residual(nn.Module):
    """x + two normalised 3 x 3 convolutions of x; the identity at first."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(width // 8, width) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        last = self.convolutions[1]
        assert isinstance(last, nn.Conv2d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
        y = x
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            y = convolution(F.silu(norm(y)))
        return x + y


class Autoencoder(nn.Module):
    """Pixels in [-1, 1] <-> latents of mean 0 and variance 1, one frame at a time."""

    mean: Tensor
    variance: Tensor

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        widths = [config.base]
        while config.space >> len(widths) > 1:
            widths.insert(0, widths[0] // 2)
        down: list[nn.Module] = [nn.PixelUnshuffle(2), nn.Conv2d(12, widths[0], 3, padding=1), Residual(widths[0])]
        up: list[nn.Module] = [nn.Conv2d(widths[0], 12, 3, padding=1), nn.PixelShuffle(2)]
        for fine, coarse in pairwise(widths):
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * fine, coarse, 1), Residual(coarse)]
            up = [nn.Conv2d(coarse, 4 * fine, 1), nn.PixelShuffle(2), Residual(fine), *up]
        self.encoder = nn.Sequential(
            *down, nn.GroupNorm(config.base // 8, config.base), nn.Conv2d(config.base, config.latents, 1)
        )
        self.decoder = nn.Sequential(nn.Conv2d(config.latents, config.base, 3, padding=1), Residual(config.base), *up)
        self.register_buffer("mean", torch.zeros(config.latents))
        self.register_buffer("variance", torch.ones(config.latents))

    def encode(self, pixels: Float[Tensor, "n height width 3"]) -> Float[Tensor, "n h w k"]:
        """Pixels -> latents: the posterior's means, standardised by the batch while training, by `standardise` else."""
        raw = self.encoder(rearrange(pixels, "n h w c -> n c h w"))
        mean, variance = None if self.training else self.mean, None if self.training else self.variance
        return rearrange(F.batch_norm(raw, mean, variance, training=self.training), "n k h w -> n h w k")

    def decode(self, latents: Float[Tensor, "n h w k"]) -> Float[Tensor, "n height width 3"]:
        """Latents, noised or not -> pixels (not clipped)."""
        return rearrange(self.decoder(rearrange(latents, "n h w k -> n k h w")), "n c h w -> n h w c")

    @torch.no_grad()
    def standardise(self, frames: UInt8[Tensor, "n height width 3"]) -> None:
        """Sets `mean` and `variance` of the latents to those over `frames`."""
        raw = in_batches(lambda part: self.encoder(rearrange(to_pixels(part), "n h w c -> n c h w")), frames)
        self.mean.copy_(raw.mean((0, 2, 3)))
        self.variance.copy_(raw.var((0, 2, 3)))


@dataclass(frozen=True)
class LatentCodecConfig:
    """Geometry of the latent codec."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    autoencoder: AutoencoderConfig
    """The network."""
    patch: int = 1
    """Side of a square patch, in places of the latents: one token."""

    def __post_init__(self) -> None:
        rows, columns, _ = self.signal
        if self.patch < 1 or rows % self.patch or columns % self.patch:
            raise ValueError(
                f"patch must divide the latents' rows and columns, got patch {self.patch} for {rows} x {columns}"
            )

    @property
    def height(self) -> int:
        """Rows of a frame, in pixels."""
        return self.autoencoder.height

    @property
    def width(self) -> int:
        """Columns of a frame, in pixels."""
        return self.autoencoder.width

    @property
    def signal(self) -> tuple[int, int, int]:
        """Rows, columns and latents of a place."""
        space = self.autoencoder.space
        return self.height // space, self.width // space, self.autoencoder.latents

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, columns, _ = self.signal
        return rows // self.patch, columns // self.patch

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.autoencoder.latents * self.patch**2


class LatentCodec(Codec):
    """Frames (..., H, W, 3) uint8 <-> tokens (..., L, C) float32: principal components of patches of latents, largest first.

    The autoencoder is frozen: no gradient reaches it, and it stays in evaluation mode. Nothing is dequantised.
    """

    shows_noise = False

    def __init__(self, config: LatentCodecConfig):
        super().__init__(config, torch.eye(config.channels), learned=True)
        self.autoencoder = Autoencoder(config.autoencoder).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LatentCodec":
        """Leaves the autoencoder as it is."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    @torch.no_grad()
    def signal(
        self, frames: UInt8[Tensor, "*b height width 3"], uniform: Float[Tensor, "*b height width 3"] | float = 0.5
    ) -> Float[Tensor, "*b h w k"]:
        """Frames -> latents, of variance 1; `uniform` has no part in it."""
        with torch.autocast(frames.device.type, enabled=False):
            return in_batches(lambda part: self.autoencoder.encode(to_pixels(part).to(self.scale.dtype)), frames)

    @torch.no_grad()
    def frames(self, signal: Float[Tensor, "*b h w k"]) -> UInt8[Tensor, "*b height width 3"]:
        """Latents -> the frames that the decoder makes of them, most of the noise taken out."""
        with torch.autocast(signal.device.type, enabled=False):
            return in_batches(lambda part: to_frames(self.autoencoder.decode(part)), signal)

    @torch.no_grad()
    def fit(self, frames: UInt8[Tensor, "n height width 3"], noise: float) -> None:
        """Sets the transform to the principal components of the patches of `frames`, then the scale of every channel."""
        patches = self._patches(self.signal(frames)).flatten(0, -2).double()
        _, vectors = torch.linalg.eigh(patches.T.cov())
        components = vectors.T.flip(0)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        self.transform.copy_(components * largest.sign())  # their signs are arbitrary
        super().fit(frames, noise)
