"""The denoiser's laws: it learns the score, sees exactly one frame ahead, and changes what is shown and nothing else."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from test_objective import batch, model
from tiny import KINDS, normal, randomised
from torch import Tensor

from sfv_world import World
from sfv_world.decoding.frames import FrameReport, read_frame
from sfv_world.decoding.solver import Denoise
from sfv_world.denoiser import Denoiser, Seen, video_score
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.flow.transformer import TransformerConfig
from sfv_world.loading import load_world
from sfv_world.model import WorldModel
from sfv_world.state import WorldOutput
from sfv_world.training.objective import ObjectiveConfig, noise_left, score_loss, world_loss

FRAMES = np.random.default_rng(0).integers(0, 256, (3, 4, 16, 24, 3), np.uint8)
ACTIONS = np.random.default_rng(1).integers(0, 3, (3, 30))


def denoising(world: World, denoise: Denoise, **changes: Any) -> World:
    return World(world.model, replace(world.decoding, denoise=denoise, **changes), world.starts)


def steps(world: World, actions: np.ndarray = ACTIONS[:, :8]) -> Iterator[tuple[Tensor, WorldOutput]]:
    """The newest frame's tokens and what is told, step by step."""
    state = world.reset(FRAMES)
    for action in actions.T:
        state, output = world.step(state, action)
        yield state.stream.tokens, output


def with_denoiser(world: WorldModel, depth: int = 1) -> WorldModel:
    """The same world with a denoiser of random weights."""
    config = replace(world.config, denoiser=TransformerConfig(16, depth, head_dim=16))
    new = WorldModel(config, world.action_space)
    new.load_state_dict(new.state_dict() | world.state_dict())
    assert new.denoiser is not None
    randomised(new.denoiser, 5)
    return new


@pytest.mark.parametrize("depth", [1, 3])
def test_a_frame_is_cleaned_by_itself_and_the_next_one_alone(depth):
    denoiser = randomised(Denoiser(TransformerConfig(16, depth, head_dim=16), channels=3, grid=(2, 2), features=5))
    tokens, features = normal(2, 6, 4, 3), normal(2, 6, 4, 5, seed=1)
    before = video_score(denoiser, tokens, features)
    for other in range(6):
        for changed in (0, 1):
            seen = [tokens.clone(), features.clone()]
            seen[changed][:, other] += 1
            same = (video_score(denoiser, seen[0], seen[1]) == before).all(dim=(0, 2, 3)).tolist()
            assert same == [n not in (other, other - 1) for n in range(6)]


def test_nothing_ahead_is_what_it_is_whatever_follows():
    denoiser = randomised(Denoiser(TransformerConfig(16, 2, head_dim=16), channels=3, grid=(2, 2), features=5))
    frame, following = (Seen(normal(2, 4, 3, seed=s), normal(2, 4, 5, seed=s + 1)) for s in (0, 2))
    shown = torch.tensor([True, False])
    mixed = denoiser(frame, following, shown)
    assert torch.equal(mixed[1], denoiser(frame)[1]) and torch.equal(mixed[0], denoiser(frame, following)[0])
    assert not torch.allclose(mixed[0], denoiser(frame)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_the_score_of_the_flow_in_units_of_the_noise(kind):
    world, data = with_denoiser(model(kind)), batch()
    assert world.denoiser is not None
    torch.nn.init.zeros_(world.denoiser.proj_out.weight), torch.nn.init.zeros_(world.denoiser.proj_out.bias)
    data = data._replace(valid=torch.ones_like(data.valid), terminal=torch.zeros_like(data.terminal))
    config = ObjectiveConfig(action_dropout=0.0, first_frame_weight=0.2)
    loss = world_loss(world, data, config, torch.Generator().manual_seed(0), plain=True)
    loss.value.backward()
    found = score_loss(world, loss, torch.Generator())  # a denoiser that says 0 is off by the target
    tokens = loss.tokens.detach().requires_grad_()
    controls = world.controls(data.actions, data.known)
    (score,) = torch.autograd.grad(world.flow.log_prob(tokens, controls).sum(), tokens)
    expected = (score * world.config.noise / world.codec.scale).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)


def test_learning_the_score_leaves_the_flow_as_it_is():
    world, data = with_denoiser(model()), batch()
    loss = world_loss(world, data, ObjectiveConfig(), torch.Generator().manual_seed(0), plain=True)
    loss.value.backward()
    assert world.denoiser is not None and all(p.grad is None for p in world.denoiser.parameters())
    before = {name: p.grad.clone() for name, p in world.named_parameters() if p.grad is not None}
    score_loss(world, loss, torch.Generator()).backward()
    for name, parameter in world.named_parameters():
        assert name.startswith("denoiser.") or name not in before or torch.equal(before[name], parameter.grad)
    assert all(p.grad is not None for p in world.denoiser.parameters())


def test_an_untrained_denoiser_leaves_all_of_the_noise():
    world, data = with_denoiser(model()), batch()
    assert world.denoiser is not None
    torch.nn.init.zeros_(world.denoiser.proj_out.weight), torch.nn.init.zeros_(world.denoiser.proj_out.bias)
    data = data._replace(
        frames=torch.randint(256, (3, 5, 4, 4, 3), dtype=torch.uint8), valid=torch.ones_like(data.valid)
    )
    many = [
        noise_left(world, data, world_loss(world, data, ObjectiveConfig(), torch.Generator().manual_seed(seed)))
        for seed in range(40)
    ]
    uniform = (2 / 256) ** 2 / 12 / world.config.noise**2  # where in its cell a value lies is noise to it, too
    assert torch.stack(many).mean().item() == pytest.approx(1 + uniform, rel=0.02)


def test_denoising_changes_what_is_shown_and_nothing_else(tiny_world):
    plain = list(steps(tiny_world))
    for (tokens, expected), (same, found) in zip(plain, steps(denoising(tiny_world, "causal")), strict=True):
        assert torch.equal(tokens, same)
        for name in set(WorldOutput._fields) - {"frames"}:
            assert torch.equal(getattr(expected, name), getattr(found, name)), name
        assert not torch.equal(expected.frames, found.frames)


def test_look_ahead_tells_of_the_frame_before(tiny_world):
    world = tiny_world
    tokens, expected = zip(*steps(world), strict=True)
    told = [output for _, output in steps(denoising(world, "lookahead"))]
    assert torch.equal(told[0].frames, torch.from_numpy(FRAMES[:, -1]))
    assert not told[0].rewards.any() and not told[0].terminated.any()
    for before, after in zip(expected, told[1:], strict=False):
        for name in set(WorldOutput._fields) - {"frames", "frames_behind"}:
            assert torch.equal(getattr(before, name), getattr(after, name)), name
        assert (after.frames_behind == 1).all() and (before.frames_behind == 0).all()
    # What is shown is what the denoiser makes of the tokens; the last frame of an episode is cleaned by itself.
    features = [report.features for report in _reports(world)]
    denoiser, codec = world.model.denoiser, world.model.codec
    for n in range(len(tokens) - 1):
        following = Seen(tokens[n + 1], features[n + 1])
        score = denoiser(Seen(tokens[n], features[n]), following, ~expected[n].terminated)
        clean = codec.decode(tokens[n] + world.model.config.noise / codec.scale * score)
        assert torch.equal(told[n + 1].frames, codec.frames(clean))


def _reports(world: World) -> list[FrameReport]:
    """The reports of the frames of `steps`, read again."""
    start, reports = world.reset(FRAMES), []
    for n, (tokens, _) in enumerate(steps(world)):
        controls = world.model.controls(*world._actions(start, ACTIONS[:, n]))
        reports.append(read_frame(world.model.flow, start.stream, tokens, controls))
    return reports


def test_some_episode_ends_while_looking_ahead(tiny_world):
    ended = torch.stack([output.terminated for _, output in steps(tiny_world, ACTIONS)])
    told = torch.stack([output.terminated for _, output in steps(denoising(tiny_world, "lookahead"), ACTIONS)])
    assert ended[:-1].any() and torch.equal(told[1:], ended[:-1])


def test_no_observed_frame_ends_the_episode(build_world):
    world = denoising(load_world(build_world()), "lookahead")
    with torch.no_grad():
        world.model.heads.mlp[-1].bias[0] = 100.0
    told = [output.terminated.tolist() for _, output in steps(world, ACTIONS[:, :2])]
    assert told == [[False] * 3, [True] * 3]  # the first is of the last observed frame, which others followed


def test_look_ahead_goes_on_bit_for_bit_from_copies_and_files(tiny_world, tmp_path):
    world = denoising(tiny_world, "lookahead")
    state = world.reset(FRAMES)
    state, _ = world.step(state, ACTIONS[:, 0])
    world.save_state(state, tmp_path / "state")
    rows = state[[2, 0]]
    _, expected = world.step(state, ACTIONS[:, 1])
    _, from_file = world.step(world.load_state(tmp_path / "state"), ACTIONS[:, 1])
    _, chosen = world.step(rows, ACTIONS[[2, 0], 1])
    assert torch.equal(expected.frames, from_file.frames)
    assert (expected.frames[[2, 0]].int() - chosen.frames.int()).abs().max() <= 1
    torch.testing.assert_close(expected.log_likelihood[[2, 0]], chosen.log_likelihood)


def test_an_observed_frame_is_told_of_as_it_was_given(tiny_world):
    world = denoising(tiny_world, "lookahead")
    state = world.reset(FRAMES[:, :3])
    state, first = world.observe(state, ACTIONS[:, 0], FRAMES[:, 3])
    _, second = world.step(state, ACTIONS[:, 1])
    assert torch.equal(first.frames, torch.from_numpy(FRAMES[:, 2]))
    assert torch.equal(second.frames, torch.from_numpy(FRAMES[:, 3]))
    _, plain = tiny_world.observe(tiny_world.reset(FRAMES[:, :3]), ACTIONS[:, 0], FRAMES[:, 3])
    assert torch.equal(second.log_likelihood, plain.log_likelihood)


@pytest.mark.parametrize("denoise", ["causal", "lookahead"])
def test_environments_keep_their_contract_and_rows_are_single_environments(tiny_folder, denoise):
    options = {"world": str(tiny_folder), "denoise": denoise}
    check_env(gym.make("sfv_world/World-v0", **options).unwrapped, skip_render_check=True)
    envs = WorldVectorEnv(3, **options, max_episode_steps=7, autoreset_mode="SameStep")
    frames, _ = envs.reset(seed=3)
    singles = [gym.make("sfv_world/World-v0", **options, max_episode_steps=7) for _ in range(3)]
    for row, env in enumerate(singles):
        assert (np.abs(env.reset(seed=3 + row)[0].astype(int) - frames[row]) <= 1).all()
    ends = 0
    for action in ACTIONS.T[:20]:
        frames, rewards, terminated, truncated, info = envs.step(action)
        for row, env in enumerate(singles):
            frame, reward, *ended, said = env.step(action[row])
            assert ended == [terminated[row], truncated[row]] and reward == pytest.approx(rewards[row], abs=1e-4)
            shown = info["final_obs"][row] if any(ended) else frames[row]
            assert (np.abs(frame.astype(int) - shown) <= 1).all()
            assert said["frames_behind"] == (denoise == "lookahead")
            if any(ended):
                ends += 1
                env.reset()
    assert ends


def test_a_world_without_a_denoiser_says_so(build_world):
    world = load_world(build_world())
    config = replace(world.model.config, denoiser=None)
    bare = World(WorldModel(config, world.action_space), replace(world.decoding, denoise="causal"))
    with pytest.raises(
        ValueError, match=r"denoise: expected 'none' for world, a world without a denoiser, got 'causal'"
    ):
        bare.reset(FRAMES)


def test_a_state_of_another_way_to_denoise_is_refused_before_it_is_used(tiny_world):
    ahead = denoising(tiny_world, "lookahead")
    for ours, theirs, said in ((ahead, tiny_world, "with look-ahead"), (tiny_world, ahead, "without look-ahead")):
        state = theirs.reset(FRAMES)
        with pytest.raises(ValueError, match=f"state: expected one of a world {said}"):
            ours.step(state, [0, 0, 0])
        with pytest.raises(ValueError, match=f"state: expected one of a world {said}"):
            ours.observe(state, [0, 0, 0], FRAMES[:, 0])
        theirs.step(state, [0, 0, 0])


def test_abduction_does_not_depend_on_how_frames_are_shown(tiny_world):
    plain = tiny_world.abduct(FRAMES, ACTIONS[:, :3])
    ahead = denoising(tiny_world, "lookahead").abduct(FRAMES, ACTIONS[:, :3])
    assert torch.equal(plain.noise, ahead.noise) and torch.equal(plain.frames, ahead.frames)
