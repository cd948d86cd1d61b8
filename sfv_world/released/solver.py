"""Decoding a block of the released layout: token by token, or in blocks of tokens by Jacobi sweeps, guided or not.

The iteration of `sfv_world.decoding.solver`, for full attention: a sweep evaluates the fields of its input, so what is returned is
the iterate that was evaluated, with its exact noise and its keys and values in the cache. Guidance changes the fields alone,
and with them the fixed point. A block of one token is sequential decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sfv_world.decoding.solver import SolverConfig
from sfv_world.flow.affine import Fields, guide
from sfv_world.layers import Told
from sfv_world.released.cache import SequenceCache
from sfv_world.released.model import FlowBlock


@dataclass
class BlockState:
    """What a block has read so far."""

    cache: SequenceCache
    """Keys and values of all slots before the next."""
    before: Float[Tensor, "b 1 c"]
    """What the next slot carries: the last token."""

    @property
    def copies(self) -> int:
        """How often it was read: 2 where guidance has it read with two texts."""
        return self.cache.rows // len(self.before) if len(self.before) else 1


class BlockStream:
    """A block and what it has read so far: sequences with a learned first slot, after their text if the block reads any.

    Args:
        block: the block.
        rows: sequences.
        turn: rotary cosines and sines of all slots, text included; as many as may be read.
        text: states of the text encoder; twice as many rows as sequences are the conditional and then the unconditional text.
        guidance: the weight w, for text of two kinds.
        state: of a stream like this one, which goes on with it; none: nothing but the text was read.
    """

    def __init__(
        self,
        block: FlowBlock,
        rows: int,
        turn: Float[Tensor, "slots two p"],
        text: Float[Tensor, "n k e"] | None = None,
        guidance: float = 0.0,
        state: BlockState | None = None,
    ):
        self.block, self.turn, self.guidance = block, turn, guidance
        self.told: Sequence[Told] = ()
        """What an adapter adds to the attention of the slots to come, layer by layer; nothing if it is empty."""
        self.copies = state.copies if state is not None else 1 if text is None else len(text) // rows
        if state is None:
            cache = block.new_cache(self.copies * rows, len(turn))
            self.state = BlockState(cache, block.sos_embed.expand(rows, -1, -1))
            if text is not None:
                self._features(block.embed(self.state.before[:, :0].repeat(self.copies, 1, 1), text))
        else:
            self.state = state

    def predict(self, carried: Float[Tensor, "b l c"]) -> "Prediction":
        """What the block says of the next tokens, by what their slots carry; the cache moves past them."""
        features = self._features(self.block.embed(carried.repeat(self.copies, 1, 1)))
        found = self.block.fields(features)
        if self.copies == 1:
            return Prediction(found, found, features)
        (mu, mu_u), (sigma, sigma_u) = found.mu.chunk(2), found.sigma.chunk(2)
        conditional = Fields(mu, sigma)
        guided = guide(conditional, Fields(mu_u, sigma_u), self.guidance)
        return Prediction(guided, conditional, features[: len(carried)])

    def read(self, tokens: Float[Tensor, "b l c"]) -> "Prediction":
        """What the block says of the next tokens, which are given."""
        found = self.predict(torch.cat([self.state.before, tokens[:, :-1]], dim=1))
        self.state.before = tokens[:, -1:]
        return found

    def _features(self, x: Tensor) -> Tensor:
        cache = self.state.cache
        at = slice(cache.length, cache.length + x.shape[1])
        return self.block.features(x, self.turn[at], cache, self.told)


class Prediction(NamedTuple):
    """What a block says of tokens, by those before them."""

    fields: Fields
    """Guided, if the stream is."""
    conditional: Fields
    """Those of the model without guidance."""
    features: Float[Tensor, "b l w"]
    """What the conditional ones are a projection of."""


class Solution(NamedTuple):
    """Tokens whose noise is the one asked for, to the certificate, and what the block says of them."""

    tokens: Float[Tensor, "b l c"]
    fields: Fields
    """Those that the tokens were drawn from."""
    conditional: Fields
    """Those of the model without guidance: what the log-likelihood is of."""
    sweeps: Int[Tensor, "b"]
    """Passes until each row was done."""
    certificate: Float[Tensor, "b"]
    """max|z' - z| of each row, at the tokens returned."""
    features: Float[Tensor, "b l w"]
    """Those of the model without guidance."""


def solve(
    stream: BlockStream,
    noise: Float[Tensor, "b l c"],
    draft: Float[Tensor, "b l c"],
    decoding: SolverConfig,
    tolerance: float,
) -> Solution:
    """Finds the next tokens of a stream, those that its fields map to `noise`, and moves the stream past them.

    A row that is done stays as it is, bit for bit, until all are; what it computes meanwhile is the same again. Rows differ
    in the time they take, not in their results.

    Args:
        stream: the block and its past.
        noise: what the tokens are to be mapped to.
        draft: where to start; the result depends on it only within the tolerance.
        decoding: tokens solved together, and the most sweeps for them.
        tolerance: of the certificate, in units of the noise.
    """
    (rows, length), size = noise.shape[:2], decoding.block or noise.shape[1]
    tokens, found = draft.clone(), []
    sweeps = torch.zeros(rows, dtype=torch.long, device=noise.device)
    certificate = noise.new_zeros(rows)
    for start in range(0, length, size):
        at, known = slice(start, min(start + size, length)), stream.state.cache.length
        wanted, count = noise[:, at], at.stop - at.start
        limit = decoding.max_sweeps or count + 1
        active: Bool[Tensor, "b"] = torch.ones(rows, dtype=torch.bool, device=noise.device)
        error = noise.new_zeros(rows)
        for sweep in range(1, limit + 1):
            stream.state.cache.length = known
            fields, conditional, features = stream.predict(
                torch.cat([stream.state.before, tokens[:, start : at.stop - 1]], dim=1)
            )
            sweeps += active
            if count == 1:  # a lone token's fields do not depend on it: it is exact at once
                tokens[:, at] = fields.denormalise(wanted)
            error = (fields.normalise(tokens[:, at])[0] - wanted).abs().amax(dim=(1, 2))
            if count == 1:
                break
            active = active & ~(error < tolerance)  # NaN is never below and goes on to the limit
            if sweep == limit or not active.any():
                break
            tokens[:, at] = torch.where(active[:, None, None], fields.denormalise(wanted), tokens[:, at])
        certificate = torch.maximum(certificate, error)
        stream.state.before = tokens[:, at.stop - 1 : at.stop]
        found.append((*fields, *conditional, features))
    mu, sigma, mu_c, sigma_c, features = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return Solution(tokens, Fields(mu, sigma), Fields(mu_c, sigma_c), sweeps, certificate, features)
