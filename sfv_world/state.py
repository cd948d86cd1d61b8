"""What a world says of a frame, and where imagined rows stand: a value that can be copied, selected, joined and kept in a file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from sfv_world.decoding.frames import StreamState
from sfv_world.given import given_seeds
from sfv_world.memory import check_rows
from sfv_world.released.stream import ReleasedStream
from sfv_world.transfer import to_device


class WorldOutput(NamedTuple):
    """What a world says of its next frame, by row."""

    frames: UInt8[Tensor, "b *time h w 3"]
    """The frame (or frames of a step): when imagined, noised as the model sees it (latent worlds: as the decoder shows that), or
    clean if denoising was asked for; when observed, as given."""
    log_likelihood: Float[Tensor, "b"]
    """log p(noised frame | all before it, actions), in nats, of pixels in [-1, 1]; in a latent world, of the noised latents."""
    bits_per_dim: Float[Tensor, "b"]
    """The same in bits per colour value (latent worlds: per latent, not comparable with pixels), negated: lower is likelier."""
    rewards: Float[Tensor, "b 2"]
    """Expected reward if the episode goes on (0) and if it ends with this frame (1)."""
    termination_probability: Float[Tensor, "b"]
    """Probability that the episode ends with this frame."""
    terminated: Bool[Tensor, "b"]
    """A draw with that probability, from the row's own randomness."""
    sweeps: Int[Tensor, "b"]
    """Passes of the deep flow."""
    shallow_sweeps: Int[Tensor, "b"]
    """Passes of the shallow blocks, all together."""
    certificate: Float[Tensor, "b"]
    """max|z' - z| between the frame's exact noise and the noise asked for."""
    guided: Bool[Tensor, "b"]
    """Whether guidance moved the frame: it is then no draw from the density that scores it."""
    noise: Float[Tensor, "b l c"]
    """The frame's exact noise."""
    frames_behind: Int[Tensor, "b"]
    """Frames that are known after the one told of: 0, or 1 with look-ahead."""

    @property
    def reward(self) -> Float[Tensor, "b"]:
        """Expected reward given `terminated`."""
        return self.rewards.gather(-1, self.terminated.long()[:, None])[:, 0]


class Held(NamedTuple):
    """The newest frame of rows that look ahead: shown and told of at the next step, when the frame after it is known."""

    output: WorldOutput
    """What is to be said of it."""
    features: Float[Tensor, "b l w"]
    """The deep flow's features of it."""
    imagined: Bool[Tensor, "b"]
    """Whether it was imagined, and not observed."""

    def map(self, function: Callable[[Tensor], Tensor]) -> "Held":
        """The same with `function` of every tensor."""
        return Held(WorldOutput(*map(function, self.output)), function(self.features), function(self.imagined))

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        output = {f"held.output.{name}": tensor for name, tensor in self.output._asdict().items()}
        return {**output, "held.features": self.features, "held.imagined": self.imagined}

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> "Held":
        """What is held in the state whose `tensors` these are."""
        output = WorldOutput(*(tensors[f"held.output.{name}"] for name in WorldOutput._fields))
        return cls(output, tensors["held.features"], tensors["held.imagined"])


@dataclass(repr=False)
class WorldState:
    """Where imagined rows stand. `step` and `observe` use a state up: index it (`state[rows]`) to keep a copy."""

    world: int
    """Checksum of the world that it is of."""
    stream: Any
    """The flow's memory of the past: a `StreamState` or, on a released model, a `ReleasedStream`."""
    frames: UInt8[Tensor, "b *time h w 3"]
    """The last frame (or frames of a step) that was shown: the very tensor of `WorldOutput.frames`. Copy before writing to it."""
    seeds: Int[np.ndarray, "b"]
    """Seed of every row."""
    ages: Int[np.ndarray, "b"]
    """Number of every row's next frame since its reset."""
    held: Held | None = None
    """What look-ahead has still to show; none without it."""
    spent: bool = False
    """Whether this state was used up."""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.seeds)

    def __repr__(self) -> str:
        used = ", used up" if self.spent else ""
        return f"WorldState({len(self)} rows{used}: seeds {self.seeds}, next frames {self.ages})"

    @torch.inference_mode(False)
    def __getitem__(self, rows: Any) -> "WorldState":
        """A copy of rows: selected, repeated or reordered by a slice, a mask or numbers.

        Raises:
            ValueError: if the state was used up, or there is no room for so many rows.
        """
        self.check()
        index = np.atleast_1d(np.arange(len(self))[rows])
        if len(self):
            check_rows(len(index), self.size / len(self), self.frames.device)
        places = to_device(index, self.frames.device)
        held = self.held and self.held.map(lambda tensor: tensor[places])
        stream, seeds, ages = self.stream.rows(places), self.seeds[index], self.ages[index]
        return WorldState(self.world, stream, self.frames[places], seeds, ages, held)

    def reseeded(self, seeds: Any) -> "WorldState":
        """A copy whose rows draw what comes by other seeds, an integer for each: other futures of the same past.

        Raises:
            ValueError: as for any copy, or if seeds are of another number, type or range.
        """
        own = self[:]
        own.seeds = given_seeds(seeds, len(own))
        return own

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but its clock, by name."""
        own = {"frames": self.frames, "seeds": torch.from_numpy(self.seeds), "ages": torch.from_numpy(self.ages)}
        return self.stream.tensors() | own | (self.held.tensors() if self.held else {})

    @classmethod
    def of(cls, world: int, tensors: dict[str, Tensor], stream: StreamState | ReleasedStream) -> "WorldState":
        """The state of a world whose `tensors` these are, `stream` made of some of them."""
        held = Held.of(tensors) if "held.features" in tensors else None
        seeds, ages = (tensors[name].cpu().numpy() for name in ("seeds", "ages"))
        return cls(world, stream, tensors["frames"], seeds, ages, held)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        held = self.held.tensors().values() if self.held else ()
        return self.stream.size + sum(tensor.nbytes for tensor in (self.frames, *held))

    @property
    def clock(self) -> int:
        """Number of the next frame in the ring's time, which all rows share."""
        return self.stream.clock

    @torch.inference_mode(False)
    def put(self, rows: Int[np.ndarray, "n"], other: "WorldState") -> None:
        """Replaces the given rows by those of `other`, a state of the same world and clock that is used up by it, in place.

        Raises:
            ValueError: if a state was used up, they do not go together, or rows are not as many as `other` has, or named twice;
                nothing has changed then.
        """
        for state in (self, other):
            state.check()
        expected, got = ((state.world, state.clock, state.held is not None) for state in (self, other))
        if got != expected:
            raise ValueError(
                f"state: expected one of the same world, clock and look-ahead {expected}, got {got}. Make it with the world that "
                "made these rows, decoding alike, at their clock (`World.at_clock`)."
            )
        if not len(np.unique(rows)) == len(rows) == len(other):
            raise ValueError(f"rows: expected {len(other)} different ones, as the state has, got {rows.tolist()}.")
        other.spent = True
        places = to_device(rows, self.frames.device)
        self.stream.put(places, other.stream)
        self.frames = self.frames.index_put((places,), other.frames)  # a new one: outputs share the old one
        if self.held and other.held:
            mine, theirs = self.held.tensors(), other.held.tensors()
            self.held = Held.of({name: tensor.index_put((places,), theirs[name]) for name, tensor in mine.items()})
        self.seeds[rows], self.ages[rows] = other.seeds, other.ages

    def check(self) -> None:
        """Raises a ValueError if the state was used up."""
        if self.spent:
            raise ValueError(
                "state: expected one that was not used up, got one that was. Keep a copy (state[:]) before a step."
            )
