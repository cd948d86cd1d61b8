"""A released model as a world's streams: where videos stand, those at the same place together, and copies of them.

The model attends to all frames of a chunk, at whole-numbered times from its first one, so videos that began at different steps
do not share a clock. Those that did are one batch: a pass of the deep block reads its weights once for all of them. Chunks
restart as in `clips`.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from sfv_world.codec.vae import Memory
from sfv_world.flow.shallow import Stage
from sfv_world.released.cache import SequenceCache
from sfv_world.released.sampling import DeepState
from sfv_world.released.solver import BlockState
from sfv_world.transfer import to_device


class Past(NamedTuple):
    """A frame of the chunk so far."""

    tokens: Float[Tensor, "b l c"]
    """Noised tokens."""
    latents: Float[Tensor, "b l c"]
    """u, after the shallow blocks."""
    controls: Float[Tensor, "b k d"]
    """Control tokens of what led to it."""


@dataclass
class Videos:
    """Where videos stand that are at the same place of their chunks."""

    rows: Int[np.ndarray, "b"]
    """Which rows of the stream they are."""
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
    """Whether the encoder has seen all of them."""

    @property
    def place(self) -> Hashable:
        """What videos must have in common to be together."""
        block = self._deep.block
        shapes = frozenset((name, tensor.shape[1:]) for name, tensor in self._rest().items())
        return self.observed, block.copies, block.cache.length, shapes

    @property
    def outline(self) -> dict[str, list[int]]:
        """What they have in common besides, by name."""
        return {"seen": self.seen.outline, "shown": self.shown.outline, "observed": [int(self.observed)]}

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all that each video has of its own, by name, videos first."""
        block = self._deep.block
        keys, values = (
            rearrange(x, "layers (n b) h l d -> b n layers h l d", n=block.copies) for x in block.cache.known()
        )
        return {"keys": keys, "values": values, **self._rest()}

    @property
    def _deep(self) -> DeepState:
        assert self.deep is not None, "whoever has a stream has read a frame"
        return self.deep

    def _rest(self) -> dict[str, Tensor]:
        """The same but for keys and values."""
        previous = self._deep.previous
        assert previous is not None, "whoever has a stream has read a frame"
        chunk = (torch.stack(part, dim=1) for part in zip(*self.chunk, strict=True))
        tensors = {**dict(zip(Past._fields, chunk, strict=True)), **previous.tensors("deep")}
        for index, stage in self.shallow.items():
            tensors |= stage.tensors(f"shallow.{index}")
        return tensors | self.seen.tensors("seen") | self.shown.tensors("shown")

    @property
    def size(self) -> int:
        """Bytes that they take: the keys and values of a whole chunk, and all else."""
        return self._deep.block.cache.nbytes + sum(tensor.nbytes for tensor in self._rest().values())

    @classmethod
    def of(
        cls,
        rows: Int[np.ndarray, "b"],
        tensors: Mapping[str, Tensor],
        outline: Mapping[str, list[int]],
        cache: SequenceCache,
    ) -> "Videos":
        """Those whose keys and values are in `cache`, and whose other `tensors` and `outline` these are."""
        previous = Stage.of(tensors, "deep")
        deep = DeepState(BlockState(cache, previous.tokens[:, -1:]), previous)
        pasts = ([x.clone() for x in tensors[name].unbind(1)] for name in Past._fields)  # a view would pickle the whole
        chunk = [Past(*parts) for parts in zip(*pasts, strict=True)]
        count = sum(name.startswith("shallow.") and name.endswith(".mu") for name in tensors)
        shallow = {index: Stage.of(tensors, f"shallow.{index}") for index in range(count)}
        seen, shown = (Memory.of(tensors, name, outline[name]) for name in ("seen", "shown"))
        return cls(rows, deep, chunk, shallow, seen, shown, bool(outline["observed"][0]))

    def select(self, index: Int[np.ndarray, "n"], rows: Int[np.ndarray, "n"]) -> "Videos":
        """Copies of some of them, which go on from here on their own, as the given rows."""
        return self._of_some(index, rows, self._deep.block.cache.select(self._sequences(index)))

    def keep(self, index: Int[np.ndarray, "n"]) -> "Videos":
        """Some of them alone; uses these up."""
        cache = self._deep.block.cache
        cache.keep(self._sequences(index))
        return self._of_some(index, self.rows[index], cache)

    def join(self, others: Sequence["Videos"]) -> "Videos":
        """These and others at the same place, together; uses all of them up."""
        if not others:
            return self
        first, *rest = (videos._rest() for videos in (self, *others))
        joined = {name: torch.cat([tensor, *(other[name] for other in rest)]) for name, tensor in first.items()}
        rows = np.concatenate([self.rows, *(videos.rows for videos in others)])
        block = self._deep.block
        block.cache.join([videos._deep.block.cache for videos in others], block.copies)
        return Videos.of(rows, joined, self.outline, block.cache)

    def _sequences(self, index: Int[np.ndarray, "n"]) -> Int[Tensor, "m"]:
        """Where in the cache some of them are, in all copies."""
        first = np.arange(self._deep.block.copies)[:, None] * len(self.rows)
        return to_device((first + index).ravel(), self.chunk[-1].tokens.device)

    def _of_some(self, index: Int[np.ndarray, "n"], rows: Int[np.ndarray, "n"], cache: SequenceCache) -> "Videos":
        where = to_device(index, self.chunk[-1].tokens.device)
        return Videos.of(rows, {name: tensor[where] for name, tensor in self._rest().items()}, self.outline, cache)


@dataclass
class ReleasedStream:
    """All that the next frames of rows depend on."""

    parts: list[Videos]
    """Those that are together."""

    clock = 0
    """Rows have none in common: any may join any others."""

    @property
    def tokens(self) -> Float[Tensor, "b l c"]:
        """Last frame's noised tokens."""
        return self.joined([videos.chunk[-1].tokens for videos in self.parts])

    def of_part(self, videos: Videos, tensor: Shaped[Tensor, "b *d"]) -> Shaped[Tensor, "n *d"]:
        """What of a tensor, rows first, is of these videos."""
        return tensor if self._in_order else tensor[to_device(videos.rows, tensor.device)]

    def joined(self, tensors: Sequence[Shaped[Tensor, "_ *d"]]) -> Shaped[Tensor, "b *d"]:
        """What is known of each part, by row."""
        if self._in_order:
            return tensors[0]
        order = np.argsort(np.concatenate([videos.rows for videos in self.parts]))
        return torch.cat(list(tensors))[to_device(order, tensors[0].device)]

    def rows(self, rows: Int[Tensor, "n"]) -> "ReleasedStream":
        """A copy of the given rows (selected, repeated, reordered)."""
        wanted, parts = rows.cpu().numpy(), []
        for videos in self.parts:
            # In the order of these videos: a copy of all of them keeps their places in the batch, where they round alike.
            index, row = np.nonzero(videos.rows[:, None] == wanted)
            if len(row) or not len(wanted):
                parts.append(videos.select(index, row))
        return ReleasedStream(parts)

    def put(self, rows: Int[Tensor, "n"], other: "ReleasedStream") -> None:
        """Replaces the given rows by those of `other`, which is used up."""
        replaced = rows.cpu().numpy()
        parts = [replace(videos, rows=replaced[videos.rows]) for videos in other.parts]
        for videos in self.parts:
            stay = np.flatnonzero(~np.isin(videos.rows, replaced))
            if len(stay) == len(videos.rows):
                parts.append(videos)
            elif len(stay):
                parts.append(videos.keep(stay))
        self.parts = parts
        self.regroup()

    def regroup(self) -> None:
        """Puts videos together that are at the same place."""
        together: dict[Hashable, list[Videos]] = {}
        for videos in self.parts:
            together.setdefault(videos.place, []).append(videos)
        self.parts = [first.join(others) for first, *others in together.values()]

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all of it, by name."""
        tensors: dict[str, Tensor] = {}
        for number, videos in enumerate(self.parts):
            outline = {f"outline.{name}": torch.tensor(values) for name, values in videos.outline.items()}
            own = {**videos.tensors(), **outline, "rows": torch.from_numpy(videos.rows)}
            tensors |= {f"{number}.{name}": tensor.clone() for name, tensor in own.items()}
        return tensors

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], new_cache: Callable[[int], SequenceCache]) -> "ReleasedStream":
        """The one whose `tensors` are among these; `new_cache` makes the deep block's, of so many rows."""
        parts: list[Videos] = []
        while f"{len(parts)}.rows" in tensors:
            lead = f"{len(parts)}."
            own = {name.removeprefix(lead): x for name, x in tensors.items() if name.startswith(lead)}
            outline = {name: own[f"outline.{name}"].tolist() for name in ("seen", "shown", "observed")}
            keys, values = (rearrange(own[x], "b n layers h l d -> layers (n b) h l d") for x in ("keys", "values"))
            cache = new_cache(keys.shape[1])
            cache.fill(keys, values)
            parts.append(Videos.of(own["rows"].cpu().numpy(), own, outline, cache))
        return cls(parts)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(videos.size for videos in self.parts)

    @property
    def _in_order(self) -> bool:
        first = self.parts[0].rows
        return len(self.parts) == 1 and np.array_equal(first, np.arange(len(first)))
