"""The outcome heads: two-hot targets that mean what they encode, at any scale of rewards, and a loss that fits them."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import normal, randomised
from torch import Tensor

from sfv_world.heads import BINS, OutcomeHeads, two_hot

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
bins = OutcomeHeads(16).bins
LIMIT = float(bins[-1])


@given(value=st.floats(-LIMIT, LIMIT, width=32))
@law(max_examples=100)
def test_the_weighted_mean_is_the_value(value: float) -> None:
    weights = two_hot(torch.tensor(value), bins)
    close(weights.sum(), torch.ones(()))
    assert (weights >= 0).all() and (weights > 0).sum() in (1, 2)
    close((weights.double() * bins).sum(), torch.tensor(value).double(), rtol=1e-5, atol=1e-6)
    places = weights.nonzero()[:, 0]
    assert places[-1] - places[0] <= 1


@given(index=st.integers(0, BINS - 1))
@law(max_examples=30)
def test_a_bin_is_its_own_target(index: int) -> None:
    weights = two_hot(bins[index], bins)
    exact(weights, torch.nn.functional.one_hot(torch.tensor(index), BINS).float())


@pytest.mark.parametrize(("value", "index"), [(1e9, -1), (float("inf"), -1), (-1e9, 0), (-float("inf"), 0)])
def test_values_outside_go_to_the_last_bin(value: float, index: int) -> None:
    assert two_hot(torch.tensor([[value]]), bins)[0, 0, index] == 1


def test_bins_are_symmetric_and_rise() -> None:
    close(bins, -bins.flip(0), rtol=1e-6, atol=1e-6)
    assert (bins.diff() > 0).all() and bins[BINS // 2].abs() < 1e-6
    assert 160_000 < LIMIT < 170_000


def test_untrained_heads_know_nothing() -> None:
    heads = OutcomeHeads(16)
    outcome = heads(normal(2, 3, 4, 16))
    assert outcome.reward_logits.shape == (2, 3, 2, BINS)
    exact(outcome.termination_probability, torch.full((2, 3), 0.5))
    close(heads.rewards(outcome), torch.zeros(2, 3, 2), rtol=0, atol=1e-2)
    reward, termination = heads.loss(outcome, normal(2, 3), torch.zeros(2, 3, dtype=torch.bool))
    close(reward, torch.full((2, 3), math.log(BINS)))
    close(termination, torch.full((2, 3), math.log(2)))


def test_the_loss_is_of_the_reward_given_what_happened() -> None:
    heads = randomised(OutcomeHeads(16))
    outcome, rewards = heads(normal(3, 4, 16)), torch.tensor([1.0, -20, 0.3])
    ended = torch.tensor([True, False, True])
    reward, termination = heads.loss(outcome, rewards, ended)
    probability = outcome.termination_probability
    close(termination, -torch.where(ended, probability, 1 - probability).log())
    log_probabilities = outcome.reward_logits.log_softmax(-1)[torch.arange(3), ended.long()]
    close(reward, -(two_hot(rewards, bins) * log_probabilities).sum(-1))
    (gradient,) = torch.autograd.grad(reward.sum(), outcome.reward_logits)
    assert gradient[0, 1].any() and not gradient[0, 0].any() and gradient[1, 0].any() and not gradient[1, 1].any()


def test_gradients_reach_features_and_weights() -> None:
    heads = randomised(OutcomeHeads(16))
    features = normal(3, 4, 16).requires_grad_()
    losses = heads.loss(heads(features), normal(3), torch.tensor([True, False, False]))
    (losses[0].sum() + losses[1].sum()).backward()
    for tensor in (features, *heads.parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any()


def test_slots_are_pooled_in_any_order_and_number() -> None:
    heads, features = randomised(OutcomeHeads(16)), normal(2, 6, 16)
    close(heads(features.flip(1)).reward_logits, heads(features).reward_logits)
    close(heads(features.repeat(1, 3, 1)).reward_logits, heads(features).reward_logits)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e5])
def test_rewards_of_any_scale_are_learned(scale: float) -> None:
    heads, features = randomised(OutcomeHeads(16), scale=0.01), normal(8, 4, 16)
    rewards: Tensor = scale * torch.tensor([-1.0, -0.5, 0, 0, 0.25, 0.5, 1, 1])
    ended = torch.arange(8) % 3 == 0
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        reward, termination = heads.loss(heads(features), rewards, ended)
        loss = (reward + termination).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = two_hot(rewards, bins)
    least = -torch.xlogy(weights, weights).sum(-1).mean().item()  # the targets' own entropy
    assert losses[-1] < least + 0.05 < losses[0]
    outcome = heads(features)
    expected = heads.rewards(outcome)[torch.arange(8), ended.long()]
    close(expected, rewards, rtol=0.05, atol=0.05 * max(scale, 1))
    close(outcome.termination_probability, ended.float(), rtol=0, atol=0.05)
