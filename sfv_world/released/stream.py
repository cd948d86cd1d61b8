"""A released model as a world's streams: where videos stand, each on its own, and copies of it.

The model attends to all frames of a chunk, at whole-numbered times from its first one, so videos that began at different steps
do not share a clock: each has its own caches and is computed alone. Chunks restart as in `clips`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.codec.vae import Memory
from sfv_world.flow.shallow import Stage
from sfv_world.released.cache import SequenceCache
from sfv_world.released.sampling import DeepState
from sfv_world.released.solver import BlockState


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

    deep: DeepState | None = None
    """What the deep block has read: the chunk so far; none before it is asked."""
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
        deep, memories = self.deep and self.deep.copy(), (self.seen.copy(), self.shown.copy())
        return Video(deep, list(self.chunk), dict(self.shallow), *memories, self.observed)

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        assert self.deep is not None and self.deep.previous is not None, "whoever has a stream has read a frame"
        cache = self.deep.block.cache
        known = {"keys": cache.keys[..., : cache.length, :], "values": cache.values[..., : cache.length, :]}
        chunk = (torch.stack(part, dim=1) for part in zip(*self.chunk, strict=True))
        tensors = known | dict(zip(Past._fields, chunk, strict=True)) | {"observed": torch.tensor(self.observed)}
        tensors |= self.deep.previous.tensors("deep")
        for index, stage in self.shallow.items():
            tensors |= stage.tensors(f"shallow.{index}")
        return tensors | self.seen.tensors("seen") | self.shown.tensors("shown")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], cache: SequenceCache) -> "Video":
        """The one whose `tensors` these are; `cache` is an empty one."""
        keys, values = tensors["keys"], tensors["values"]
        cache.length = keys.shape[3]
        cache.keys[..., : cache.length, :], cache.values[..., : cache.length, :] = keys, values
        previous = Stage.of(tensors, "deep")
        deep = DeepState(BlockState(cache, previous.tokens[:, -1:]), previous)
        chunk = [Past(*parts) for parts in zip(*(tensors[name].unbind(1) for name in Past._fields), strict=True)]
        count = sum(name.startswith("shallow.") and name.endswith(".mu") for name in tensors)
        shallow = {index: Stage.of(tensors, f"shallow.{index}") for index in range(count)}
        memories = Memory.of(tensors, "seen"), Memory.of(tensors, "shown")
        return cls(deep, chunk, shallow, *memories, bool(tensors["observed"]))


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

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all of it, by name: rows may share tensors, files cannot."""
        rows = enumerate(video.tensors() for video in self.videos)
        return {f"{row}.{name}": tensor.clone() for row, tensors in rows for name, tensor in tensors.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], new_cache: Callable[[], SequenceCache]) -> "ReleasedStream":
        """The one whose `tensors` are among these; `new_cache` makes the deep block's, of a row."""
        count, videos = sum(name.endswith(".observed") for name in tensors), []
        for row in range(count):
            own = {name.removeprefix(f"{row}."): x for name, x in tensors.items() if name.startswith(f"{row}.")}
            videos.append(Video.of(own, new_cache()))
        return cls(videos)
