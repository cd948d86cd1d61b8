"""The fixed-point solver: inverts an affine autoregressive block by Jacobi sweeps.

x -> mu(x) + sigma(x) z depends on earlier tokens only, so it has one fixed point, which sweeps reach from any draft in at most
as many steps as there are tokens (arXiv 2002.03629), and mostly in three. A sweep evaluates mu and sigma at its *input*,
so it also knows that input's exact noise z' = (x - mu) / sigma. The solver therefore returns the iterate it evaluated,
never the one it would try next: fields, noise and cached keys and values are exactly those of what is returned, and
the certificate max|z' - z| says how far that is from what was asked for. Tokens within the tolerance, with all before them, are
settled: they stay as they are, and later sweeps evaluate only what follows them.

On a GPU, the host learns how far a sweep came while the next one is computed, so it never waits for an idle device. What is
settled already is then evaluated once more, which changes nothing.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.flow.affine import guide
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.shallow import Stage
from sfv_world.flow.transformer import SlotTransformer
from sfv_world.given import check_number
from sfv_world.transfer import Fetch, to_device

Draft = Literal["fields", "tokens", "noise", "zeros", "learned"]
Denoise = Literal["none", "causal", "lookahead"]

BEHIND = {"cuda": 1}
"""Sweeps that the host's knowledge of convergence is behind, by type of device; 0 elsewhere."""


@dataclass(frozen=True)
class SolverConfig:
    """How a flow is inverted."""

    tolerance: float = 1e-3
    """Largest certificate max|z' - z| of a frame, in units of the noise."""
    block: int | None = None
    """Tokens solved together; none: the whole frame. 1 is sequential decoding."""
    max_sweeps: int | None = None
    """Most sweeps a block of tokens may take; none: as many as always suffice."""
    draft: Draft = "fields"
    """Where iteration starts: last frame's fields with the new noise, last frame's tokens, the noise, zeros, or a learned
    guess of the autoregressive deep flow's latents (shallow blocks then start from fields)."""
    temperature: float = 1.0
    """Standard deviation of the noise; 1 samples the model's distribution."""

    def __post_init__(self) -> None:
        check_number("tolerance", self.tolerance, "a positive number", math.ulp(0.0))
        check_number("temperature", self.temperature, "at least 0", 0.0)
        for name in ("block", "max_sweeps"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | np.integer) and value >= 1):
                raise ValueError(f"{name}: expected None or at least 1, a whole number, got {value!r}.")
        if self.draft not in get_args(Draft):
            raise ValueError(f"draft: expected one of {get_args(Draft)}, got {self.draft!r}.")


@dataclass(frozen=True)
class DecodingConfig(SolverConfig):
    """How frames are decoded."""

    guidance: float = 0.0
    """Weight w of guidance on the action: p(frame | action)^(1+w) / p(frame | no action)^w, channel by channel; 0 samples the
    model's distribution. A world on a released model is guided by its prompt, too: away from what it says with neither. Likelihoods
    stay those of the unguided model."""
    denoise: Denoise = "none"
    """What is shown of a frame: itself, noised; clean, as far as it and the past tell ("causal"); or cleaner, once the next
    frame is known ("lookahead"): all that is said is then said one step later. The world goes on from noised frames."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("guidance", self.guidance, "at least 0", 0.0)
        if self.denoise not in get_args(Denoise):
            raise ValueError(f"denoise: expected one of {get_args(Denoise)}, got {self.denoise!r}.")


class Solution(NamedTuple):
    """Tokens whose noise is the one asked for, to the certificate."""

    tokens: Float[Tensor, "b l c"]
    features: Float[Tensor, "b l w"]
    """The block's features of those tokens."""
    without: Float[Tensor, "b l w"]
    """The same as told of what is guided away from; where nothing is, `features`."""
    sweeps: Int[Tensor, "b"]
    """Passes that each row took part in."""
    certificate: Float[Tensor, "b"]
    """max|z' - z| of each row, at the tokens returned."""


def draft_tokens(noise: Float[Tensor, "b l c"], previous: Stage, draft: Draft) -> Float[Tensor, "b l c"]:
    """The iterate to start from, given what the same block did to the frame before."""
    match draft:
        case "fields" | "learned":
            return previous.fields.denormalise(noise)
        case "tokens":
            return previous.tokens
        case "noise":
            return noise
        case "zeros":
            return torch.zeros_like(noise)


def solve(
    block: SlotTransformer,
    noise: Float[Tensor, "b l c"],
    draft: Float[Tensor, "b l c"],
    cache: FrameCache | None,
    *,
    tolerance: float | Float[Tensor, "b"],
    size: int | None,
    max_sweeps: int | None,
    before: Float[Tensor, "b 1 c"],
    controls: Float[Tensor, "b k d"] | None = None,
    condition: Float[Tensor, "b l e"] | None = None,
    unguided: Float[Tensor, "b k d"] | None = None,
    guidance: float = 0.0,
) -> Solution:
    """Finds the tokens of the current frame of `cache` that `block`, in token order, maps to `noise`.

    Args:
        block: the affine autoregressive block.
        noise: its output.
        draft: where to start; the result depends on it only within the tolerance.
        cache: the block's cache, which ends up with the keys and values of the tokens returned; none for a block that sees
            one frame and solves it whole.
        tolerance: of the certificate, for all rows or each.
        size: tokens solved together; none: the whole frame.
        max_sweeps: for each `size` tokens; none: one more than there are tokens, which always suffices.
        before: what slot 0 carries: the token before the frame's first, or the start token.
        controls: control tokens of the frame.
        condition: per-slot conditioning.
        unguided: control tokens to guide away from; none: the block's own fields are what is solved for.
        guidance: how far.

    A row's result never depends on the other rows; a row that is done takes no further part.
    """
    rows, length = noise.shape[:2]
    device = noise.device
    tolerances = tolerance if isinstance(tolerance, Tensor) else torch.full((rows,), tolerance, device=device)
    tokens = draft.clone()
    features = without = noise.new_empty(rows, length, block.config.width)
    caches, branches = ([], []) if cache is None else ([cache], [controls])
    if cache is not None and unguided is not None:  # the current frame once more, in keys and values of its own
        caches.append(cache.rows(torch.arange(rows, device=device)))
        branches.append(unguided)
        without = torch.empty_like(features)
    sweeps = torch.zeros(rows, dtype=torch.long, device=device)
    errors = noise.new_zeros(rows, length)
    for start in range(0, length, size or length):
        stop = min(start + (size or length), length)
        limit = max_sweeps or stop - start + 1
        settled = torch.full((rows,), start, device=device)  # tokens that are, with all before them
        # What the host knows: which rows take part, in caches of their own, and what they all have settled.
        active, works, known, told = np.arange(rows), caches, start, deque[Fetch]()
        taking_part = to_device(active, device)
        for sweep in range(1, limit + 1):
            # Slots before the first token that any row has open are done: their keys and values are in the cache.
            at = slice(known if works else start, stop)
            now, wanted = tokens[taking_part], noise[taking_part, at]
            first = before[taking_part] if at.start == 0 else now[:, at.start - 1 : at.start]
            carried = torch.cat([first, now[:, at.start : at.stop - 1]], dim=1)
            if works:
                at_slots = _pick(condition, taking_part, at)
                seen = [
                    block.decode(carried, work, at, _pick(told_of, taking_part), at_slots)
                    for work, told_of in zip(works, branches, strict=True)
                ]
            else:
                given = None if condition is None else condition[taking_part, None]
                seen = [block.features(carried[:, None], condition=given)[:, 0]]
            fields = block.fields(seen[0])
            if len(seen) > 1:
                fields = guide(fields, block.fields(seen[1]), guidance)
            sweeps[taking_part] += settled[taking_part] < stop
            without[taking_part, at], features[taking_part, at] = seen[-1], seen[0]
            if stop - start == 1:  # a lone token's fields do not depend on it: it is exact at once
                tokens[taking_part, at] = fields.denormalise(wanted)
                break
            found, _ = fields.normalise(now[:, at])
            error = (found - wanted).abs().amax(dim=2)
            errors[taking_part, at] = error
            fine = error < tolerances[taking_part, None]  # NaN is never below and goes on to the limit
            settled[taking_part] = torch.maximum(settled[taking_part], at.start + fine.cumprod(1).sum(1))
            told.append(Fetch([settled]))
            if sweep == limit:
                far = np.full(rows, stop)
            elif len(told) > BEHIND.get(device.type, 0):
                (far,) = told.popleft().wait()
            else:
                far = np.full(rows, known)
            finished = far[active] == stop
            if works is not caches and finished.any():
                gone = to_device(np.flatnonzero(finished), device)
                for whole, work in zip(caches, works, strict=True):
                    whole.write_current(taking_part[gone], work.rows(gone))
            if finished.all():
                break
            unsettled = torch.arange(at.start, stop, device=device) >= settled[taking_part, None]
            tokens[taking_part, at] = torch.where(unsettled[..., None], fields.denormalise(wanted), now[:, at])
            if finished.any():
                going = to_device(np.flatnonzero(~finished), device)
                active, taking_part = active[~finished], taking_part[going]
                works = [work.rows(going) for work in works]
            known = int(far[active].min())
    return Solution(tokens, features, without, sweeps, errors.amax(1))


def _pick(x: Tensor | None, rows: Tensor, at: slice | None = None) -> Tensor | None:
    if x is None:
        return None
    return x[rows] if at is None else x[rows, at]
