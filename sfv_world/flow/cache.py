"""The frame cache: keys and values of the last W frames, in one preallocated ring.

A value that is passed in and out of decoding, never module state. All rows share one clock and march in lockstep;
a row that knows fewer than W frames has its older ones marked invisible.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfv_world.layers import attend


@dataclass
class FrameCache:
    """Keys and values of a windowed Transformer over frames of L slots.

    Frame number `n` lives in ring place `n % window`. The frame numbered `clock` is the one being decoded: its place
    is rewritten by every sweep until `advance` makes it part of the past.
    """

    keys: Float[Tensor, "layers rows heads slots_of_all_frames head_dim"]
    values: Float[Tensor, "layers rows heads slots_of_all_frames head_dim"]
    visible: Bool[Tensor, "rows window"]
    clock: int
    recorded_time: Int[Tensor, "1"] | None = None
    """The clock where it is to be data, as in a step that is recorded at one clock and replayed at another."""

    @property
    def time(self) -> Int[Tensor, "1"]:
        """The clock, on the device."""
        if self.recorded_time is not None:
            return self.recorded_time
        return torch.full((1,), self.clock, device=self.keys.device)

    @property
    def slots(self) -> int:
        """Slots a frame, L."""
        return self.keys.shape[3] // self.window

    @property
    def window(self) -> int:
        """Frames a query can see, W, its own included."""
        return self.visible.shape[1]

    @property
    def current(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the current frame."""
        place = self._place(self.clock % self.window, slice(0, self.slots))
        return self.keys[:, :, :, place], self.values[:, :, :, place]

    def fill(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stores the keys and values (rows, frames, heads, slots, head_dim) of the frames that end just before `clock`."""
        for back in range(1, min(self.window, k.shape[1]) + 1):
            place = self._place((self.clock - back) % self.window, slice(0, self.slots))
            self.keys[layer, :, :, place] = k[:, -back]
            self.values[layer, :, :, place] = v[:, -back]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, at: slice, mask: Tensor | None) -> Tensor:
        """Writes keys and values of the slots `at` of the current frame, then attends to the whole ring."""
        place = self._place(self.clock % self.window, at)
        self.keys[layer, :, :, place] = k
        self.values[layer, :, :, place] = v
        keys, values = self.keys[layer], self.values[layer]
        return attend(q, keys.to(q.dtype), values.to(q.dtype), mask)

    def mask(self, at: slice, causal: bool) -> Bool[Tensor, "#rows 1 #queries keys"] | None:
        """True where a query of the slots `at` sees a key; None where every query sees everything."""
        visible = self.visible.clone()
        visible[:, self.clock % self.window] = True
        # Elsewhere, asking would make the host wait, and a recording is to hold whatever is visible.
        here = visible.device.type == "cpu" and self.recorded_time is None
        if not causal and here and bool(visible.all()):
            return None
        mask = visible.repeat_interleave(self.slots, dim=1)[:, None, None, :]
        if causal:
            own = self._place(self.clock % self.window, slice(0, self.slots))
            slots = torch.arange(self.slots, device=mask.device)
            mask = mask.expand(-1, 1, at.stop - at.start, -1).clone()
            mask[..., own] = slots[None, :] <= slots[at, None]
        return mask

    def advance(self) -> None:
        """Makes the current frame part of the past."""
        self.visible[:, self.clock % self.window] = True
        self.clock += 1

    def rows(self, rows: Int[Tensor, "n"]) -> "FrameCache":
        """A copy of the given rows (selected, repeated, reordered)."""
        return FrameCache(self.keys[:, rows], self.values[:, rows], self.visible[rows], self.clock)

    def put(self, rows: Int[Tensor, "n"], other: "FrameCache") -> None:
        """Replaces the given rows by those of `other`, a cache of the same clock."""
        assert self.clock == other.clock, f"rows march in lockstep, got clocks {self.clock} and {other.clock}"
        self.keys[:, rows], self.values[:, rows] = other.keys, other.values
        self.visible[rows] = other.visible

    def write_current(self, rows: Int[Tensor, "n"], other: "FrameCache") -> None:
        """Takes over the current frame of `other`, whose rows are the given rows of this cache."""
        place = self._place(self.clock % self.window, slice(0, self.slots))
        self.keys[:, rows, :, place], self.values[:, rows, :, place] = other.current

    def _place(self, frame: int, at: slice) -> slice:
        return slice(frame * self.slots + at.start, frame * self.slots + at.stop)
