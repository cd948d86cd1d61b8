"""A released model as a world's streams: where videos stand, each on its own, and copies of it.

The model attends to all frames of a chunk, at whole-numbered times from its first one, so videos that began at different steps
do not share a clock: each has its own caches and is computed alone. Chunks restart as in `clips`.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.codec.vae import Memory
from sfv_world.flow.shallow import Stage
from sfv_world.released.sampling import DeepStream


class Past(NamedTuple):
    """A frame of the chunk so far."""

    tokens: Float[Tensor, "1 l c"]
    """Noised tokens."""
    latents: Float[Tensor, "1 l c"]
    """u, after the shallow blocks."""
    controls: Float[Tensor, "1 k d"]
    """Control tokens of what led to it."""


@dataclass
class Video:
    """Where one video stands."""

    deep: DeepStream
    """The deep block, which has read the chunk so far."""
    chunk: list[Past] = field(default_factory=list)
    """The chunk so far, the frames it began with included."""
    shallow: dict[int, Stage] = field(default_factory=dict)
    """Last frame's tokens and fields in each shallow block, to draft from."""
    seen: Memory = field(default_factory=Memory)
    """The encoder's."""
    shown: Memory = field(default_factory=Memory)
    """The decoder's."""
    observed: bool = True
    """Whether the encoder has seen all of it."""

    def copy(self) -> "Video":
        """One that goes on from here on its own."""
        memories = self.seen.copy(), self.shown.copy()
        return Video(self.deep.copy(), list(self.chunk), dict(self.shallow), *memories, self.observed)


@dataclass
class ReleasedStream:
    """All that the next frames of rows depend on."""

    videos: list[Video]

    clock = 0
    """Rows have none in common: any may join any others."""

    @property
    def tokens(self) -> Float[Tensor, "b l c"]:
        """Last frame's noised tokens."""
        return torch.cat([video.chunk[-1].tokens for video in self.videos])

    def rows(self, rows: Int[Tensor, "n"]) -> "ReleasedStream":
        """A copy of the given rows (selected, repeated, reordered)."""
        return ReleasedStream([self.videos[row].copy() for row in rows.tolist()])

    def put(self, rows: Int[Tensor, "n"], other: "ReleasedStream") -> None:
        """Replaces the given rows by those of `other`."""
        for row, video in zip(rows.tolist(), other.videos, strict=True):
            self.videos[row] = video
