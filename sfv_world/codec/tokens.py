"""What all codecs of a world share: a signal on a grid, cut into patches that become tokens.

    frames --signal--> signal (h, w, k) --+ noise--> noised signal --encode--> tokens --decode--> noised signal --frames--> frames

A world's noise is added to the signal, and its density is that of the noised signal. Between signal and tokens there is
only an orthonormal transform of each patch and a scale for each channel, whose constant Jacobian is part of the likelihood.
"""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn


@runtime_checkable
class CodecShape(Protocol):
    """What a codec's configuration says of its sizes."""

    @property
    def height(self) -> int:
        """Rows of a frame, in pixels."""

    @property
    def width(self) -> int:
        """Columns of a frame, in pixels."""

    @property
    def patch(self) -> int:
        """Side of a square patch of the signal: one token."""

    @property
    def signal(self) -> tuple[int, int, int]:
        """Rows, columns and values of a place of the signal."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    def channels(self) -> int:
        """Channels of a token."""


class Codec(nn.Module):
    """Frames (..., H, W, 3) uint8 <-> tokens (..., L, C) float32, L patches of a signal in raster order.

    Args:
        config: the sizes.
        transform: (C, C) orthonormal, from the values of a patch (row, column, value) to the channels of its token.
        learned: whether `transform` is saved with the weights.
    """

    transform: Tensor
    scale: Tensor

    time = 1
    """Frames of a step, which has one frame's worth of tokens; a video's first frame is a step of its own."""
    shows_noise = True
    """Whether the noise of tokens is to be seen in their frames, so that a frame of theirs is read without more of it."""

    def __init__(self, config: CodecShape, transform: Float[Tensor, "c c"], learned: bool):
        super().__init__()
        self.config = config
        self.register_buffer("transform", transform.float(), persistent=learned)
        self.register_buffer("scale", torch.ones(config.channels))

    def signal(
        self, frames: UInt8[Tensor, "*b height width 3"], uniform: Float[Tensor, "*b height width 3"] | float = 0.5
    ) -> Float[Tensor, "*b h w k"]:
        """The clean signal of frames; `uniform` in [0, 1) is where in its cell each colour value lies, if that matters."""
        raise NotImplementedError

    def frames(self, signal: Float[Tensor, "*b h w k"]) -> UInt8[Tensor, "*b height width 3"]:
        """The frames that show a signal, noised or not."""
        raise NotImplementedError

    def noise_log_density(
        self, noised: Float[Tensor, "*b h w k"], frames: UInt8[Tensor, "*b height width 3"], noise: float
    ) -> Float[Tensor, "*b"]:
        """log q(noised signal | frame) of the noise that makes a signal from a frame, in nats a frame; `noise` > 0."""
        z = (noised - self.signal(frames)) / noise
        return (-0.5 * z.square() - math.log(noise * math.sqrt(2 * math.pi))).sum((-1, -2, -3))

    def steps(self, frames: int) -> int:
        """The steps that so many frames of a video are.

        Raises:
            ValueError: if they are no whole steps.
        """
        if frames < 1 or (frames - 1) % self.time:
            raise ValueError(
                f"frames: expected 1 + a multiple of the {self.time} frames of a step, got {frames}. Give more, or fewer."
            )
        return 1 + (frames - 1) // self.time

    def whole(self, frames: int) -> int:
        """The fewest frames that are whole steps of a video and at least so many."""
        return 1 + -(-(frames - 1) // self.time) * self.time

    def by_step(self, x: Shaped[Tensor, "b n *d"]) -> Shaped[Tensor, "b t time *d"]:
        """What is known of every frame of whole steps, by step; a video's first step has zeros before its only frame."""
        padded = torch.cat([torch.zeros_like(x[:, :1]).repeat_interleave(self.time - 1, dim=1), x], dim=1)
        return padded.unflatten(1, (-1, self.time))

    @property
    def log_det(self) -> Float[Tensor, ""]:
        """log|det d(tokens)/d(signal)| of one frame, in nats."""
        rows, columns = self.config.grid
        return -rows * columns * self.scale.log().sum()

    def fit(self, frames: UInt8[Tensor, "n height width 3"], noise: float) -> None:
        """Sets the scale of every channel to its standard deviation over `frames`, noise included."""
        values = self._patches(self.signal(frames)) @ self.transform.T
        self.scale.copy_((values.flatten(0, -2).var(0) + noise**2).sqrt())

    def encode(self, signal: Float[Tensor, "*b h w k"]) -> Float[Tensor, "*b l c"]:
        """Signal -> tokens, in float32 under autocast, too: bfloat16 would round away more than the noise."""
        with torch.autocast(signal.device.type, enabled=False):
            return self._patches(signal) @ self.transform.T / self.scale

    def decode(self, tokens: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b h w k"]:
        """Tokens -> signal (not clipped): the inverse of `encode`."""
        rows, columns = self.config.grid
        with torch.autocast(tokens.device.type, enabled=False):
            patches = (tokens * self.scale) @ self.transform
        return rearrange(
            patches,
            "... (r c) (i j k) -> ... (r i) (c j) k",
            r=rows,
            c=columns,
            i=self.config.patch,
            j=self.config.patch,
        )

    def _patches(self, signal: Tensor) -> Tensor:
        patch = self.config.patch
        return rearrange(signal, "... (r i) (c j) k -> ... (r c) (i j k)", i=patch, j=patch)


def in_batches(function: Callable[[Tensor], Tensor], x: Tensor, trailing: int = 3, largest: int = 256) -> Tensor:
    """`function` of images x (..., *trailing dimensions), whatever their leading dimensions, at most `largest` at once."""
    lead = x.shape[:-trailing]
    parts = [function(part) for part in x.reshape(-1, *x.shape[-trailing:]).split(largest)]
    y = torch.cat(parts)
    return y.reshape(*lead, *y.shape[1:])
