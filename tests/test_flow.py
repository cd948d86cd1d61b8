"""The parts of the flow: affine fields, rotary positions, slots and their order, the shallow stack, the frame cache."""

import math
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import normal, randomised, tiny_flow, video
from torch.autograd.functional import jacobian

from sfv_world.flow.affine import Fields, standard_normal_log_prob
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.model import DeepKind
from sfv_world.flow.shallow import BandFlow
from sfv_world.flow.spline import REACH, Curve, Spline
from sfv_world.flow.transformer import Order, SlotTransformer, TransformerConfig
from sfv_world.layers import Attention, FinalNorm, Rope, rotate

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
seeds = st.integers(0, 10_000)
each_kind = pytest.mark.parametrize("kind", ["frame-parallel", "autoregressive"])
each_order = pytest.mark.parametrize("order", ["token", "frame"])


def transformer(order: Order, window: int = 3, depth: int = 2, seed: int = 0, double: bool = False) -> SlotTransformer:
    """A block over frames of 2 x 2 slots of 3 channels."""
    config = TransformerConfig(16, depth, head_dim=16, window=window)
    block = randomised(SlotTransformer(config, channels=3, grid=(2, 2), order=order, control_width=5), seed)
    return block.double() if double else block


# Affine maps ---------------------------------------------------------------------------------------------------------


@given(scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), seed=seeds)
@law(max_examples=12)
def test_fields_stay_in_their_bounds_and_invert(scale: float, seed: int) -> None:
    parameters = scale * normal(2, 4, 6, seed=seed)
    assert Fields.from_parameters(parameters, clip_mean=True).mu.abs().max() <= 4
    fields = Fields.from_parameters(parameters)
    assert torch.equal(fields.mu, parameters[..., 3:])  # what is rare and bright is far from the mean
    assert 0.031 - 1e-3 < fields.sigma.min() and fields.sigma.max() < 4.56
    x = normal(2, 4, 3, seed=seed + 1)
    z, log_det = fields.normalise(x)
    close(fields.denormalise(z), x, atol=1e-6 * max(1.0, scale))
    close(log_det, -fields.sigma.log().sum(-1))


def test_zero_parameters_are_the_identity() -> None:
    x = normal(2, 4, 3)
    z, log_det = Fields.from_parameters(torch.zeros(2, 4, 6)).normalise(x)
    close(z, x, rtol=0, atol=1e-6)
    close(log_det, torch.zeros(2, 4), rtol=0, atol=1e-6)


def test_zero_parameters_are_a_straight_curve() -> None:
    x, zeros = 4 * normal(2, 4, 3, dtype=torch.float64), partial(torch.zeros, dtype=torch.float64)
    fields = Fields.from_parameters(zeros(2, 4, 6))
    z, log_det = Curve(fields, Spline.from_parameters(zeros(2, 4, 3, Spline.parameters(5)))).normalise(x)
    close(z, x, rtol=0, atol=1e-6)
    close(log_det, zeros(2, 4), rtol=0, atol=1e-6)


@given(bins=st.integers(2, 12), scale=st.sampled_from([0.1, 1.0, 5.0]), seed=seeds)
@law(max_examples=20)
def test_a_spline_is_a_monotone_curve_with_the_slopes_it_says(bins: int, scale: float, seed: int) -> None:
    parameters = scale * normal(1, 4, 3, Spline.parameters(bins), seed=seed, dtype=torch.float64)
    spline = Spline.from_parameters(parameters.expand(1201, -1, -1, -1))
    v = torch.linspace(-6, 6, 1201, dtype=torch.float64)[:, None, None].repeat(1, 4, 3).requires_grad_()
    z, log_slope = spline.forward(v)
    (slope,) = torch.autograd.grad(z.sum(), v)
    close(slope.log(), log_slope, rtol=0, atol=1e-9)
    assert (z.diff(dim=0) > 0).all()
    close(spline.inverse(z), v, rtol=0, atol=1e-7)
    beyond = v.abs() > REACH
    exact(z[beyond], v[beyond])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_fields_are_at_least_float32(dtype: torch.dtype) -> None:
    expected = torch.promote_types(dtype, torch.float32)
    assert Fields.from_parameters(torch.ones(1, 1, 2, dtype=dtype)).sigma.dtype == expected
    assert FinalNorm(4).to(expected)(torch.ones(1, 4, dtype=dtype)).dtype == expected


def test_standard_normal_has_its_constant() -> None:
    close(standard_normal_log_prob(torch.zeros(1, 2, 3)), torch.full((1, 2), -1.5 * math.log(2 * math.pi)))


# Rotary positions ----------------------------------------------------------------------------------------------------


@given(shift=st.sampled_from([1, 17, 1000, 10**9]), first=st.integers(0, 30), second=st.integers(0, 30), seed=seeds)
@law(max_examples=15)
def test_rotary_products_depend_on_relative_time_only(shift: int, first: int, second: int, seed: int) -> None:
    rope = Rope(32, 2, 3)
    q, k = normal(6, 32, seed=seed), normal(6, 32, seed=seed + 1)

    def products(offset: int) -> torch.Tensor:
        turns = rope(torch.tensor([first, second]) + offset)
        return rotate(q, turns[0]) @ rotate(k, turns[1]).T

    close(products(shift), products(0), rtol=0, atol=1e-4)


def test_rotary_pairs_turn_by_row_column_and_time() -> None:
    cos, sin = Rope(32, 2, 3)(torch.tensor([5]))[0].unbind(-2)
    angles = torch.atan2(sin, cos)
    close(angles[:, 0], torch.tensor([0.0, 0, 0, 1, 1, 1]))
    close(angles[:, 6], torch.tensor([0.0, 1, 2, 0, 1, 2]))
    close(angles[:, 12], torch.full((6,), 5 - 2 * math.pi))
    close(cos.square() + sin.square(), torch.ones(6, 16))


# Slots and their order -----------------------------------------------------------------------------------------------


@each_order
def test_slots_carry_what_came_before(order: Order) -> None:
    block, tokens = transformer(order), normal(2, 3, 4, 3)
    carried = block.shift(tokens)
    if order == "token":
        exact(carried[:, 0, 0], block.sos_embed[0].expand(2, -1))
        exact(carried[:, 1:, 0], tokens[:, :-1, -1])
        exact(carried[:, :, 1:], tokens[:, :, :-1])
    else:
        exact(carried[:, 0], block.sos_embed.expand(2, 4, -1))
        exact(carried[:, 1:], tokens[:, :-1])


@given(frame=st.integers(0, 2), token=st.integers(0, 3), seed=seeds)
@law(max_examples=12)
def test_token_order_is_causal_within_the_frame(frame: int, token: int, seed: int) -> None:
    """Fields of the token itself and of all before it stay, bit for bit; those of the next token change."""
    block, tokens = transformer("token", seed=seed), normal(1, 3, 4, 3, seed=seed)
    changed = tokens.clone()
    changed[:, frame, token] += 1
    before, after = (block.fields(block.features(block.shift(x)))[0].flatten(1, 2) for x in (tokens, changed))
    index = 4 * frame + token
    exact(after[:, : index + 1], before[:, : index + 1])
    if index < 11:
        assert not torch.equal(after[:, index + 1], before[:, index + 1])


@each_order
@given(at=st.sampled_from([(0, 4), (0, 1), (3, 4), (1, 3)]), seed=seeds)
@law(max_examples=8)
@torch.no_grad()
def test_decoding_some_slots_is_the_parallel_pass(order: Order, at: tuple[int, int], seed: int) -> None:
    """Slots of the current frame may come in pieces, later ones once the earlier ones are there."""
    block, slots, controls = transformer(order, seed=seed), normal(2, 5, 4, 3, seed=seed), normal(2, 5, 2, 5, seed=1)
    if order == "frame":
        at = (0, 4)
    cache = block.new_cache(2)
    expected = block.features(slots, controls)
    for n in range(5):
        for start, stop in ((0, at[0]), at, (at[1], 4)):
            if start < stop:
                seen = block.decode(slots[:, n, start:stop], cache, slice(start, stop), controls[:, n])
                close(seen, expected[:, n, start:stop])
        cache.advance()


@torch.no_grad()
def test_slots_of_frame_order_see_each_other_and_know_their_place() -> None:
    block, slots = transformer("frame"), normal(1, 1, 1, 3).expand(-1, -1, 4, -1).clone()
    features = block.features(slots)
    assert not torch.equal(features[0, 0, 0], features[0, 0, 3])
    slots[:, :, 3] += 1
    assert not torch.equal(block.features(slots)[0, 0, 0], features[0, 0, 0])


@given(window=st.integers(1, 3), seed=seeds)
@law(max_examples=5)
@torch.no_grad()
def test_a_block_inverts_itself(window: int, seed: int) -> None:
    block, tokens = transformer("token", window, seed=seed, double=True), normal(2, 3, 4, 3, seed=seed).double()
    cache, before = block.new_cache(2), block.sos_embed.expand(2, -1, -1)
    for n in range(3):
        noise, _ = block.fields(block.features(block.shift(tokens))[:, n]).normalise(tokens[:, n])
        close(block.inverse(noise, cache, before), tokens[:, n], rtol=0, atol=1e-10)
        cache.advance()
        before = tokens[:, n, -1:]


# The shallow stack ---------------------------------------------------------------------------------------------------


@each_kind
def test_each_shallow_block_has_the_determinant_it_says(kind: DeepKind) -> None:
    """Its Jacobian is triangular in its own direction, with every token's determinant on the diagonal."""
    shallow = tiny_flow(kind, blocks=3, dtype=torch.float64).shallow
    condition = normal(1, 4, 16, dtype=torch.float64) if kind == "frame-parallel" else None
    tokens = normal(1, 4, 3, dtype=torch.float64)
    _, total, stages = shallow(tokens, condition)
    sums = torch.zeros(4, dtype=torch.float64)
    for index, stage in enumerate(stages):
        alone = tiny_flow(kind, blocks=1, dtype=torch.float64).shallow
        alone.blocks[0] = shallow.blocks[index]
        # A lone block is block 0, which reads a frame from its end; so is the last token the first in its direction.
        own = None if condition is None else (condition if index % 2 == 0 else condition.flip(-2))
        matrix = jacobian(lambda x, alone=alone, own=own: alone(x, own)[0], stage.tokens.flip(-2)).reshape(4, 3, 4, 3)
        log_det = torch.stack([torch.linalg.slogdet(matrix[i, :, i]).logabsdet for i in range(4)])
        close(alone(stage.tokens.flip(-2), own)[1][0], log_det, rtol=0, atol=1e-10)
        assert not any(matrix[i, :, j].any() for i in range(4) for j in range(i))
        assert matrix[0, :, 1].any()
        sums += log_det if index % 2 == 0 else log_det.flip(0)
    close(total[0], sums, rtol=0, atol=1e-10)


@each_kind
@torch.no_grad()
def test_shallow_blocks_alternate_in_direction(kind: DeepKind) -> None:
    flow = tiny_flow(kind, blocks=3)
    tokens, condition = normal(2, 4, 3), normal(2, 4, 16) if kind == "frame-parallel" else None
    _, _, stages = flow.shallow(tokens, condition)
    exact(stages[0].tokens, tokens.flip(-2))
    z, _ = stages[0].fields.normalise(stages[0].tokens)
    exact(stages[1].tokens, z.flip(-2))


@torch.no_grad()
def test_deep_features_condition_the_shallow_blocks_slot_by_slot() -> None:
    """In the block that reads backwards too, a slot's condition is that of the token it predicts."""
    shallow = tiny_flow("frame-parallel", blocks=1).shallow
    tokens, condition = normal(1, 4, 3), normal(1, 4, 16)
    for slot in range(4):
        changed = condition.clone()
        changed[:, slot] += 1
        moved = (shallow(tokens, changed)[0] != shallow(tokens, condition)[0]).any(-1)[0]
        assert moved.tolist() == [i <= slot for i in range(4)]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_band_follows_from_the_coarser_ones_of_the_whole_frame(groups: Literal[1, 2, 4]) -> None:
    """From no finer band, and from no other value of its own but, in the first one, those of the groups before."""
    shallow = randomised(BandFlow(TransformerConfig(16, 1, head_dim=16), (2, 4), (1, 2, 3), groups, (3,), 16)).double()
    tokens, condition = normal(1, 8, 6, dtype=torch.float64), normal(1, 8, 16, seed=1, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: shallow(x, condition)[0][0], tokens)[:, :, 0]
    band = torch.tensor([0, 1, 1, 2, 2, 2])
    group = {1: [[0] * 4] * 2, 2: [[0, 1, 0, 1], [1, 0, 1, 0]], 4: [[0, 2, 0, 2], [3, 1, 3, 1]]}[groups]
    group = torch.tensor(group).flatten()
    for token, channel in np.ndindex(8, 6):
        moves = jacobian[token, channel] != 0  # (token, channel) that this latent depends on
        expected = (band < band[channel]).repeat(8, 1)
        if channel == 0:
            expected[:, 0] = group < group[token]
        expected[token, channel] = True
        assert (moves == expected).all()
    assert shallow.passes == groups + 2


def test_bands_must_be_those_of_the_tokens() -> None:
    config = tiny_flow().config
    with pytest.raises(ValueError, match=r"add up to the 3 channels, got \(1, 1\)"):
        replace(config, bands=(1, 1))
    with pytest.raises(ValueError, match=r"groups must be 1, 2 or 4, and 1 without bands, got 2 and bands \(\)"):
        replace(config, groups=2)
    with pytest.raises(ValueError, match=r"bins must be 2 to 100, .* bands \(1, 2\), got \(8, 1\)"):
        replace(config, bands=(1, 2), bins=(8, 1))


# The frame cache -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_encoding_is_the_same_with_a_cache() -> None:
    flow = tiny_flow("autoregressive")
    tokens, controls = video(flow, 2, 5)
    cache = flow.deep.new_cache(2, clock=5)
    exact(flow(tokens, controls, cache).log_prob, flow(tokens, controls).log_prob)
    assert cache.keys.any() and cache.window == 3 and cache.slots == 4


def test_rows_of_a_cache_are_copies() -> None:
    block = transformer("token")
    cache = block.new_cache(2, clock=4)
    cache.keys.normal_(generator=torch.Generator().manual_seed(0))
    copy = cache.rows(torch.tensor([1, 1, 0]))
    exact(copy.keys[:, 0], cache.keys[:, 1])
    copy.keys.zero_()
    copy.values.fill_(1)
    copy.advance()
    assert cache.keys.any() and not cache.values.any() and not cache.visible.any()
    assert (cache.clock, copy.clock) == (4, 5)


def test_a_cache_takes_over_the_current_frame_only() -> None:
    cache = transformer("token").new_cache(3, clock=7)
    other = FrameCache(cache.keys[:, :2] + 1, cache.values[:, :2] + 2, cache.visible[:2], 7)
    cache.write_current(torch.tensor([2, 0]), other)
    keys = cache.keys.unflatten(3, (3, 4))
    exact(keys[:, [0, 2], :, 7 % 3], torch.ones_like(keys[:, [0, 2], :, 1]))
    assert keys.sum() == keys[:, [0, 2], :, 7 % 3].sum() and cache.values.sum() == 2 * keys.sum()


# Errors --------------------------------------------------------------------------------------------------------------


def test_errors_say_what_was_expected() -> None:
    config = tiny_flow().config
    with pytest.raises(ValueError, match=r"shallow.window must be 1 .* got 2"):
        replace(config, shallow=replace(config.shallow, window=2))
    with pytest.raises(ValueError, match="multiple of 16 .* got 24"):
        Rope(24, 2, 2)
    with pytest.raises(ValueError, match="width must be a multiple of head_dim, got width 40 and head_dim 16"):
        Attention(40, 16)
