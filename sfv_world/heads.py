"""Reward and termination, read off the deep features of the pass that was run anyway.

The reward is a distribution over bins whose symmetric logarithms are evenly spaced, trained on two-hot targets, so that
any reward scale works (DreamerV3, arXiv 2301.04104). Termination is a Bernoulli probability.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

BINS = 255
SYMLOG_LIMIT = 12.0  # rewards up to about 160,000 either way


def two_hot(x: Float[Tensor, "*b"], bins: Float[Tensor, "k"]) -> Float[Tensor, "*b k"]:
    """Weights of the two bins around each value, whose weighted mean is the value; values outside go to the last bin."""
    x = x.clamp(bins[0], bins[-1])
    above = torch.searchsorted(bins, x.contiguous()).clamp(1, len(bins) - 1)
    low, high = bins[above - 1], bins[above]
    weight = ((x - low) / (high - low))[..., None]
    one_hot = F.one_hot(torch.stack([above - 1, above]), len(bins)).to(x.dtype)
    return (1 - weight) * one_hot[0] + weight * one_hot[1]


class Outcome(NamedTuple):
    """What the heads say came with a frame: p(termination) p(reward | termination)."""

    reward_logits: Float[Tensor, "*b 2 k"]
    """Of the reward's bins, given that the episode goes on (0) or ended (1)."""
    termination_logit: Float[Tensor, "*b"]

    @property
    def termination_probability(self) -> Float[Tensor, "*b"]:
        """Probability that the episode ended with the frame."""
        return self.termination_logit.sigmoid()


class OutcomeHeads(nn.Module):
    """Pools a frame's slots, by learned queries and their mean, and predicts whether the episode ended with it, and its reward.

    Args:
        width: channels of a slot.
        queries: how many; 0 for frames of one slot, which is its mean.
        hidden: width of the hidden layer.
    """

    bins: Tensor

    def __init__(self, width: int, queries: int = 4, hidden: int = 128):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width) / width**0.5) if queries else None
        output = nn.Linear(hidden, 2 * BINS + 1)
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)
        self.mlp = nn.Sequential(nn.Linear((queries + 1) * width, hidden), nn.SiLU(), output)
        symlog = torch.linspace(-SYMLOG_LIMIT, SYMLOG_LIMIT, BINS)
        self.register_buffer("bins", symlog.sign() * symlog.abs().expm1(), persistent=False)

    def forward(self, features: Float[Tensor, "*b l w"]) -> Outcome:
        """Features of the slots of frames -> logits of their rewards and terminations."""
        pooled = features.mean(-2)
        if self.queries is not None:
            weights = (features @ self.queries.T).softmax(dim=-2)
            pooled = torch.cat([rearrange(weights.mT @ features, "... q w -> ... (q w)"), pooled], dim=-1)
        output = self.mlp(pooled).float()
        return Outcome(rearrange(output[..., 1:], "... (two k) -> ... two k", two=2), output[..., 0])

    def rewards(self, outcome: Outcome) -> Float[Tensor, "*b 2"]:
        """Expected reward if the episode goes on (0) and if it ended (1), in the environment's own unit."""
        return (outcome.reward_logits.softmax(-1) * self.bins).sum(-1)

    def loss(
        self, outcome: Outcome, rewards: Float[Tensor, "*b"], terminations: Bool[Tensor, "*b"]
    ) -> tuple[Float[Tensor, "*b"], Float[Tensor, "*b"]]:
        """Cross-entropies (reward given termination, termination) of every frame, in nats."""
        logits = torch.where(
            terminations[..., None], outcome.reward_logits[..., 1, :], outcome.reward_logits[..., 0, :]
        )
        reward = -(two_hot(rewards, self.bins) * logits.log_softmax(-1)).sum(-1)
        termination = F.binary_cross_entropy_with_logits(
            outcome.termination_logit, terminations.float(), reduction="none"
        )
        return reward, termination
