"""Where imagined rows stand: a value that can be copied, selected, repeated, joined and kept in a file."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from sfv_world.decoding.frames import StreamState
from sfv_world.flow.affine import Fields
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.shallow import Stage


@dataclass
class WorldState:
    """Where imagined rows stand. `step` and `observe` use a state up: index it (`state[rows]`) to keep a copy."""

    stream: StreamState
    """The flow's memory of the past."""
    frames: UInt8[Tensor, "b h w 3"]
    """The last frame, as `WorldOutput.frames` has it."""
    seeds: Int[np.ndarray, "b"]
    """Seed of every row."""
    ages: Int[np.ndarray, "b"]
    """Number of every row's next frame since its reset."""
    spent: bool = False
    """Whether this state was used up."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.seeds)

    def __getitem__(self, rows: Any) -> "WorldState":
        """A copy of rows: selected, repeated or reordered by a slice, a mask or numbers."""
        self.check()
        index = np.atleast_1d(np.arange(len(self))[rows])
        places = torch.from_numpy(index).to(self.frames.device)
        return WorldState(self.stream.rows(places), self.frames[places], self.seeds[index], self.ages[index])

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but its clock, by name."""
        cache = self.stream.cache
        tensors = {"keys": cache.keys, "values": cache.values, "visible": cache.visible, "frames": self.frames}
        tensors["tokens"] = self.stream.tokens
        tensors |= {"seeds": torch.from_numpy(self.seeds), "ages": torch.from_numpy(self.ages)}
        for index, stage in enumerate([self.stream.deep, *self.stream.shallow]):
            tensors |= {
                f"{index}.tokens": stage.tokens,
                f"{index}.mu": stage.fields.mu,
                f"{index}.sigma": stage.fields.sigma,
            }
        return tensors

    @classmethod
    def of(cls, tensors: dict[str, Tensor], clock: int) -> "WorldState":
        """The state whose `tensors` and clock these are."""
        count = sum(name.endswith(".tokens") for name in tensors)
        parts = [[tensors[f"{index}.{part}"] for part in ("tokens", "mu", "sigma")] for index in range(count)]
        deep, *shallow = [Stage(tokens, Fields(mu, sigma)) for tokens, mu, sigma in parts]
        cache = FrameCache(tensors["keys"], tensors["values"], tensors["visible"], clock)
        stream = StreamState(cache, tensors["tokens"], deep, shallow)
        return cls(stream, tensors["frames"], tensors["seeds"].cpu().numpy(), tensors["ages"].cpu().numpy())

    @property
    def clock(self) -> int:
        """Number of the next frame in the ring's time, which all rows share."""
        return self.stream.cache.clock

    def put(self, rows: Int[np.ndarray, "n"], other: "WorldState") -> None:
        """Replaces the given rows by those of `other`, a state of the same world and clock, in place."""
        self.check()
        places = torch.from_numpy(rows).to(self.frames.device)
        self.stream.put(places, other.stream)
        self.frames = self.frames.index_put((places,), other.frames)  # a new one: outputs share the old one
        self.seeds[rows], self.ages[rows] = other.seeds, other.ages

    def check(self) -> None:
        """Raises a ValueError if the state was used up."""
        if self.spent:
            raise ValueError(
                "state: expected one that was not used up, got one that was. Keep a copy (state[:]) before a step."
            )
