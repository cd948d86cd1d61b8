"""The video codec: frames to the latents of a video VAE, and back, as the tokens of a world.

After a video's first frame, `time` frames at once are one latent frame: a world of such latents goes on by so many frames a step.
The VAE looks back in time, so a stream of frames passes a `Memory` in; without one a video begins. It is frozen, and no part of
a world's own weights. A world's density is that of the noised latents: the VAE has no part in it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from sfv_world.codec.tokens import Codec
from sfv_world.codec.vae import ImageCodec, Memory, WanCodec, to_frames, to_pixels


@dataclass(frozen=True)
class VideoCodecConfig:
    """Geometry of the video codec."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    height: int
    """Rows of a frame, in pixels."""
    width: int
    """Columns of a frame, in pixels."""
    space: int
    """Side of the square of pixels that a place of the latents stands for."""
    time: int
    """Frames that a latent frame stands for, the first one aside."""
    latents: int
    """Latents of a place."""
    patch: int = 1
    """Side of a square patch, in places of the latents: one token."""

    def __post_init__(self) -> None:
        side = self.space * self.patch
        if self.height < side or self.width < side or self.height % side or self.width % side:
            raise ValueError(
                f"height, width: expected multiples of {side} pixels, which are a token, got frames of {self.height} x "
                f"{self.width}. Give them, or record them (`sfv-world collect`), in such a size."
            )

    @property
    def signal(self) -> tuple[int, int, int]:
        """Rows, columns and latents of a place."""
        return self.height // self.space, self.width // self.space, self.latents

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.signal[0] // self.patch, self.signal[1] // self.patch

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return self.latents * self.patch**2


class VideoCodec(Codec):
    """Videos (b, n, H, W, 3) uint8 <-> tokens (b, t, L, C) float32 of latents, just as the VAE has them."""

    config: VideoCodecConfig
    shows_noise = False

    def __init__(self, config: VideoCodecConfig, vae: WanCodec | ImageCodec):
        super().__init__(config, torch.eye(config.channels), learned=False)
        self.vae, self.time = vae, config.time
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def signal(
        self,
        frames: UInt8[Tensor, "b n height width 3"],
        uniform: Tensor | float = 0.5,
        memory: Memory | None = None,
    ) -> Float[Tensor, "b t h w k"]:
        """Frames -> latents; `uniform` has no part in it, `memory` is of the frames before."""
        with torch.autocast(frames.device.type, enabled=False):
            return rearrange(self.vae.encode(to_pixels(frames), memory), "b t k h w -> b t h w k")

    @torch.no_grad()
    def frames(
        self, signal: Float[Tensor, "b t h w k"], memory: Memory | None = None
    ) -> UInt8[Tensor, "b n height width 3"]:
        """Latents -> frames, `time` of each but a video's first; `memory` is of the latents before."""
        with torch.autocast(signal.device.type, enabled=False):
            return to_frames(self.vae.decode(rearrange(signal, "b t h w k -> b t k h w"), memory))
