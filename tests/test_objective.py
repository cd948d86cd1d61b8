"""The training loss: the likelihood with all its constants, of the frames that count and no others."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import KINDS, Kind, normal, of_kind, randomised
from torch import Tensor

from sfv_world.codec.pixels import PixelCodecConfig
from sfv_world.data.clips import Clips
from sfv_world.flow.model import DeepKind, FlowConfig
from sfv_world.flow.transformer import TransformerConfig
from sfv_world.model import ModelConfig, WorldModel, model_config
from sfv_world.training.distributed import Group
from sfv_world.training.objective import Batch, ObjectiveConfig, agreement, patch_weights, with_errors, world_loss

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
each_kind = pytest.mark.parametrize("kind", KINDS)
HALVES = ((0, slice(0, 20)), (1, slice(20, 40)))
SPACE = spaces.Dict(key=spaces.Discrete(3), turn=spaces.Box(-1, 1, (1,)))


def model(kind: Kind = "frame-parallel", random: bool = True) -> WorldModel:
    """A world of 4 x 4 frames in 4 tokens."""
    codec = PixelCodecConfig(4, 4, patch=2)
    sizes = TransformerConfig(16, 1, head_dim=16, window=2), TransformerConfig(16, 1, head_dim=16)
    flow = of_kind(FlowConfig(codec.channels, codec.grid, *sizes, shallow_blocks=2, control_width=4), kind)
    world = WorldModel(ModelConfig(codec, flow), SPACE)
    world.codec.scale.copy_(torch.linspace(0.3, 2, codec.channels))
    return randomised(world) if random else world


def batch(seed: int = 0) -> Batch:
    """Three clips of five frames; the last two are padded after three, and the third ends with a repeated screen."""
    generator = np.random.default_rng(seed)
    lengths = np.array([[5], [3], [3]])
    valid = np.arange(5) < lengths
    terminations, terminal = np.zeros((3, 5), bool), np.zeros((3, 5), bool)
    terminations[2, 2], terminal[2, 2] = True, True
    actions = {
        "key": generator.integers(3, size=(3, 4)),
        "turn": generator.uniform(-1, 1, size=(3, 4, 1)).astype(np.float32),
    }
    clips = Clips(
        frames=generator.integers(256, size=(3, 5, 4, 4, 3), dtype=np.uint8),
        actions=actions,
        rewards=generator.normal(size=(3, 5)).astype(np.float32),
        terminations=terminations,
        valid=valid,
        terminal=terminal,
    )
    return Batch.from_clips(clips, model())


def loss(world: WorldModel, data: Batch, seed: int = 0, **config: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss with its own randomness, and its parts."""
    found = world_loss(world, data, ObjectiveConfig(**config), torch.Generator().manual_seed(seed))
    return found.value, found.metrics


def changed(data: Batch, where: Tensor, *names: str) -> Batch:
    """A batch with other values in the given frames."""
    values = {
        "frames": lambda x: 255 - x,
        "actions": lambda x: x + 1,
        "rewards": lambda x: x + 3,
        "terminations": lambda x: ~x,
    }
    mask = {name: where.view(*where.shape, *[1] * (getattr(data, name).ndim - 2)) for name in names}
    return data._replace(**{n: torch.where(mask[n], values[n](getattr(data, n)), getattr(data, n)) for n in names})


def same(world: WorldModel, a: Batch, b: Batch, *names: str, **config: Any) -> bool:
    """Whether these metrics (all, and the loss, if none are named) are the same bit for bit."""
    (loss_a, metrics_a), (loss_b, metrics_b) = (loss(world, data, **config) for data in (a, b))
    if not names:
        return torch.equal(loss_a, loss_b) and all(torch.equal(metrics_a[n], metrics_b[n]) for n in metrics_a)
    return all(torch.equal(metrics_a[name], metrics_b[name]) for name in names)


FLOW = ("nats_per_dim", "next_frame_bits_per_dim")
HEADS = ("reward_loss", "termination_loss")


@each_kind
def test_padding_counts_nowhere(kind: Kind) -> None:
    world, data = model(kind), batch()
    assert same(world, data, changed(data, ~data.valid, "frames", "actions", "rewards", "terminations"))
    counted = torch.zeros(3, 5, dtype=torch.bool)
    counted[1, 2] = True
    for name in ("frames", "actions", "rewards", "terminations"):
        assert not same(world, data, changed(data, counted, name), action_dropout=0.0)


@each_kind
def test_a_repeated_screen_is_no_target_for_the_flow(kind: Kind) -> None:
    world, data = model(kind), batch()
    assert same(world, data, changed(data, data.terminal, "frames", "actions", "rewards", "terminations"), *FLOW)
    assert not same(world, data, changed(data, data.terminal, "rewards"), "reward_loss")
    assert not same(world, data, changed(data, data.terminal, "terminations"), "termination_loss")
    shown = data._replace(terminal=torch.zeros_like(data.terminal))
    assert not same(world, data, shown, *FLOW)


@each_kind
def test_the_first_frame_is_no_target_for_the_heads(kind: Kind) -> None:
    world, data = model(kind), batch()
    first = (torch.arange(5) == 0).expand(3, -1)
    assert same(world, data, changed(data, first, "actions", "rewards", "terminations"))
    assert not same(world, data, changed(data, first, "frames"), "nats_per_dim")


def test_the_first_frame_has_its_own_weight() -> None:
    world, data = model(), batch()
    parts = {w: loss(world, data, first_frame_weight=w)[1] for w in (0.0, 1.0, 3.0)}
    later, firsts, others = parts[0.0]["nats_per_dim"], 3, 7  # frames of the batch that count
    first = (parts[1.0]["nats_per_dim"] * (firsts + others) - later * others) / firsts
    close(parts[3.0]["nats_per_dim"], (3 * firsts * first + others * later) / (3 * firsts + others))
    close(later / math.log(2), parts[0.0]["next_frame_bits_per_dim"])
    for part in parts.values():
        exact(part["next_frame_bits_per_dim"], parts[0.0]["next_frame_bits_per_dim"])


@each_kind
def test_hidden_actions_are_the_unknown_action(kind: Kind) -> None:
    world, data = model(kind), batch()
    unknown = data._replace(known=torch.zeros_like(data.known))
    later = (torch.arange(5) > 0).expand(3, -1)
    other_actions = changed(data, later, "actions")
    assert same(world, data, other_actions, action_dropout=1.0)
    assert same(world, data, unknown, action_dropout=1.0)
    assert not same(world, data, other_actions, action_dropout=0.0)
    for dropout, parts in ((0.0, (data, data)), (1.0, (data, unknown))):
        exact(loss(world, parts[0], action_dropout=dropout)[0], loss(world, parts[1], action_dropout=0.0)[0])
    some = loss(world, data, action_dropout=0.5)[0]
    assert some not in (loss(world, data, action_dropout=d)[0] for d in (0.0, 1.0))


@each_kind
def test_a_seed_decides_the_loss(kind: Kind) -> None:
    world, data = model(kind), batch()
    exact(loss(world, data, seed=3)[0], loss(world, data, seed=3)[0])
    assert loss(world, data, seed=3)[0] != loss(world, data, seed=4)[0]


@given(reward=st.floats(0, 2), termination=st.floats(0, 2))
@law(max_examples=5)
def test_the_loss_is_its_weighted_parts(reward: float, termination: float) -> None:
    total, parts = loss(model(), batch(), reward_weight=reward, termination_weight=termination)
    expected = parts["flow_loss"] + reward * parts["reward_loss"] + termination * parts["termination_loss"]
    close(total, expected)
    assert total.requires_grad and not any(part.requires_grad for part in parts.values())


@each_kind
def test_gradients_reach_every_weight(kind: Kind) -> None:
    world = model(kind)
    loss(world, batch(), action_dropout=0.3)[0].backward()
    for name, parameter in world.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@each_kind
def test_the_flows_part_is_the_likelihood_of_noised_pixels(kind: Kind) -> None:
    """An untrained flow is the identity, so tokens are standard normal under it; the rest is the codec's Jacobian."""
    world, data = model(kind, random=False), batch()
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(data.frames.shape, generator=generator)
    noise = torch.randn(data.frames.shape, generator=generator)
    pixels = world.codec.signal(data.frames, uniform) + 0.05 * noise
    tokens = world.codec.encode(pixels)
    log_prob = torch.distributions.Normal(0.0, 1.0).log_prob(tokens).sum((-2, -1)) + world.codec.log_det
    counted = data.valid & ~data.terminal
    close(loss(world, data, seed=5)[1]["nats_per_dim"], -log_prob[counted].mean() / 48)


def test_clips_become_tensors_aligned_to_frames() -> None:
    data = batch()
    assert data.actions.shape == (3, 5, 4) and not data.actions[:, 0].any()
    exact(data.actions[:, 1:, :3].sum(-1), torch.ones(3, 4))
    assert data.known.tolist() == [[False, True, True, True, True]] * 3


def test_a_batch_without_a_frame_that_counts_is_no_division_by_zero() -> None:
    data = batch()
    total, _ = loss(model(), data._replace(valid=torch.zeros_like(data.valid)))
    assert total == 0


# Where the loss looks -------------------------------------------------------------------------------------------------


def test_patches_weigh_by_what_moved_before() -> None:
    world = model()
    still = normal(2, 1, 4, world.config.flow.channels).expand(-1, 5, -1, -1)
    exact(patch_weights(still, world, 50.0), torch.ones(2, 5, 4))  # no noise in it: less change than noise makes
    moved = still.clone()
    moved[1, 2, 0] += 3  # frame 2 differs from the ones around it
    weights = patch_weights(moved, world, 50.0)
    close(weights.mean(), torch.tensor(1.0))
    assert (weights[1, 3:] > 5 * weights[1, :3].max()).all()  # of 2 x 2 patches all are neighbours
    exact(weights[0], weights[1, 0, 0].expand(5, 4))
    exact(patch_weights(moved, world, 0.0), torch.ones(2, 5, 4))


def test_patches_weigh_by_what_was_rare_before() -> None:
    world = model()
    tokens = torch.ones(2, 5, 4, world.config.flow.channels)  # a mean square of 1 is ordinary
    exact(patch_weights(tokens, world, 0.0, rare=2.0), torch.ones(2, 5, 4))
    tokens[1, :, 0] = 2.0
    weights = patch_weights(tokens, world, 0.0, rare=2.0)
    close(weights.mean(), torch.tensor(1.0))
    close(weights[1, 2:] / weights[0, 2:], torch.full((3, 4), 7.0))  # 1 + 2 (4 - 1), in all neighbours
    exact(weights[1, :2], weights[0, :2])


@pytest.mark.parametrize("weights", [{"motion": 1.0}, {"motion": 0.0, "rare": 2.0}])
def test_weights_do_not_look_at_what_they_weigh(weights: dict[str, float]) -> None:
    world, tokens = model(), normal(1, 5, 4, 12)
    changed = tokens.clone()
    changed[:, 4] = 7
    exact(patch_weights(changed, world, **weights), patch_weights(tokens, world, **weights))
    changed[:, 3] = 7
    assert not torch.equal(patch_weights(changed, world, **weights), patch_weights(tokens, world, **weights))


def test_numbers_out_of_range_are_told() -> None:
    for name, value, expected in (
        ("action_dropout", 2.0, "0 to 1"), ("errors", -0.1, "0 to 1"), ("imagined", 1.5, "0 to 1"),
        ("motion_weight", -5.0, "at least 0"), ("rare_weight", math.inf, "at least 0"), ("reward_weight", -1.0, "at least 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"{name}: expected {expected}, got {value}"):
            ObjectiveConfig(**{name: value})


def test_errors_drown_a_rectangle_through_some_frames() -> None:
    tokens, draw = normal(40, 5, 12, 2), lambda: torch.Generator().manual_seed(1)
    exact(with_errors(tokens, (3, 4), 0.0, draw()), tokens)
    found = with_errors(tokens, (3, 4), 1.0, draw())
    exact(with_errors(tokens, (3, 4), 1.0, draw()), found)
    changed = (found != tokens).all(-1).reshape(40, 5, 3, 4)
    assert (changed.flatten(1).any(1)).all() and not changed.flatten(1).all(1).all()
    for clip in changed:
        spans = [clip.amax(other) for other in ((1, 2), (0, 2), (0, 1))]
        assert torch.equal(clip, torch.einsum("t,r,c->trc", *(span.float() for span in spans)).bool())
        assert all(span.int().diff().abs().sum() - span[0].int() - span[-1].int() <= 2 for span in spans)
    some = (with_errors(tokens, (3, 4), 0.5, draw()) != tokens).flatten(1).any(1)
    assert 10 < some.sum() < 30
    halves = [with_errors(tokens[part], (3, 4), 0.5, draw(), Group(rank, 2)) for rank, part in HALVES]
    exact(torch.cat(halves), with_errors(tokens, (3, 4), 0.5, draw()))  # two processes drown what one would


def test_errors_are_of_the_past_alone() -> None:
    world, clips = model("bands"), batch()
    tokens = world.noised_tokens(clips.frames, torch.rand(clips.frames.shape), torch.randn(clips.frames.shape))
    wrong = tokens.clone()
    wrong[:, 2] += 3
    plain, told = (world(tokens, clips.actions, clips.known, told=x).log_likelihood for x in (tokens, wrong))
    exact(plain, world(tokens, clips.actions, clips.known).log_likelihood)
    exact(plain[:, :3], told[:, :3])
    assert (plain[:, 3] != told[:, 3]).all()
    found = [
        world_loss(world, clips, ObjectiveConfig(errors=errors), torch.Generator().manual_seed(0))
        for errors in (0.0, 1.0)
    ]
    exact(found[0].tokens, found[1].tokens)
    assert found[0].value != found[1].value
    same = [
        world_loss(world, clips, ObjectiveConfig(errors=errors), torch.Generator().manual_seed(0), plain=True).value
        for errors in (0.0, 1.0)
    ]
    exact(*same)
    with pytest.raises(ValueError, match="errors: expected 0 to 1, got 1.5"):
        ObjectiveConfig(errors=1.5)


# Configurations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frame-parallel", "autoregressive"])
@pytest.mark.parametrize("bands", [None, 0, 3])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_dial_sizes_a_model(kind: DeepKind, bands: int | None, size: int) -> None:
    config = model_config(size, 16, 24, patch=4, kind=kind, bands=bands)
    default = 6 if kind == "frame-parallel" else 0
    assert len(config.flow.bands) == (default if bands is None else bands)
    assert config.flow.deep.depth == size and config.flow.deep.width == 48 * size
    assert config.flow.grid == (4, 6) and config.flow.channels == 48 and config.dimensions == 16 * 24 * 3
    frames = torch.zeros(1, 2, 16, 24, 3, dtype=torch.uint8)
    world = WorldModel(config, spaces.Discrete(2))
    tokens = world.noised_tokens(frames, torch.full(frames.shape, 0.5), normal(*frames.shape))
    reading = world(tokens, torch.zeros(1, 2, 2), torch.zeros(1, 2, dtype=torch.bool))
    assert reading.log_likelihood.shape == (1, 2) and reading.outcome.reward_logits.shape[:3] == (1, 2, 2)


def test_flow_and_codec_must_fit() -> None:
    config = model_config(1, 16, 16, patch=4)
    with pytest.raises(ValueError, match=r"expected \(channels, grid\) \(192, \(2, 2\)\).*got \(48, \(4, 4\)\)"):
        ModelConfig(PixelCodecConfig(16, 16, patch=8), config.flow)


@torch.no_grad()
def test_a_frame_is_drawn_anew_from_the_real_ones_before_it() -> None:
    world, clips = model("bands"), batch()
    tokens = world.noised_tokens(clips.frames, torch.rand(clips.frames.shape), torch.randn(clips.frames.shape))
    encoding = world(tokens, clips.actions, clips.known).encoding
    close(world.flow.redraw(encoding, encoding.noise), tokens, atol=1e-4)
    other = encoding.noise.clone()
    other[:, 2] += 1
    moved = (world.flow.redraw(encoding, other) != world.flow.redraw(encoding, encoding.noise)).flatten(2).any(2)
    assert moved[:, 2].all() and not moved[:, [0, 1, 3, 4]].any()


def test_everything_is_learned_from_imagined_pasts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    world, clips = model("bands"), batch()
    alone, with_own = (loss(world, clips, imagined=imagined)[1] for imagined in (0.0, 1.0))
    exact(with_own["nats_per_dim"], alone["nats_per_dim"])  # what is reported is of the real past
    for name in ("flow_loss", "termination_loss", "reward_loss"):
        assert with_own[name] != alone[name]
    redraw = world.flow.redraw
    monkeypatch.setattr(world.flow, "redraw", lambda encoding, noise: redraw(encoding, encoding.noise))
    for name, value in loss(world, clips, imagined=1.0)[1].items():  # what is drawn is what was real
        close(value, alone[name], atol=1e-4)


def test_frames_are_no_target_where_the_past_was_drawn_otherwise() -> None:
    past = torch.zeros(1, 3, 12, 4)
    past[0, 1, 6] = 2.0  # row 1, column 2 of 3 x 4
    kept = agreement(past, torch.zeros_like(past), (3, 4), gap=1.9)
    assert kept[0, :2].all() and kept[0, 2].view(3, 4).tolist() == [[1.0, 0.0, 0.0, 0.0]] * 3
    assert agreement(past, torch.zeros_like(past), (3, 4), gap=2.0).all()
    world, clips = model("bands"), batch()
    everywhere, nowhere = (loss(world, clips, imagined=1.0, imagined_gap=gap)[1] for gap in (None, 1e-6))
    assert nowhere["flow_loss"] != everywhere["flow_loss"]
    for name in ("termination_loss", "nats_per_dim"):  # the heads', and what is reported, stay as they are
        exact(nowhere[name], everywhere[name])
    with pytest.raises(ValueError, match="imagined_gap: expected none or a positive number, got 0.0"):
        ObjectiveConfig(imagined_gap=0.0)
