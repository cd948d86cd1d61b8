"""Other futures of the same past: states, environments and rows that go on by other chance."""

import gymnasium as gym
import jaxtyping
import numpy as np
import pytest
import torch

from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.envs.world_env import WorldEnv

FRAMES = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 24, 3), np.uint8)
ACTIONS = np.array([[0, 2, 1, 0], [1, 1, 0, 2]])


def test_a_reseeded_state_draws_by_its_seeds(tiny_world):
    """From a past that was observed by the same seeds, it is the state of those seeds; and the first one stays."""
    state, frames = tiny_world.start([5, 6]), []
    for other in (state.reseeded([7, 8]), state[:], state.reseeded([5, 9]), state.reseeded(torch.tensor([7, 8]))):
        for action in (0, 1):
            other, output = tiny_world.step(other, [action, 2])
        frames.append(output.frames)
    assert torch.equal(frames[0], frames[3])
    assert torch.equal(frames[1][0], frames[2][0]) and not torch.equal(frames[1][1], frames[2][1])
    assert not torch.equal(frames[0][0], frames[1][0])
    fork = state.reseeded([1, 2])[[1, 1]]
    assert fork.seeds.tolist() == [2, 2] and state.seeds.tolist() == [5, 6]
    for wrong in ([1], [1, -2], [0.5, 1.5]):
        with pytest.raises(ValueError, match="seeds: expected 2 integers"):
            state.reseeded(wrong)
    tiny_world.step(state, [0, 0])
    with pytest.raises(ValueError, match="state: expected one that was not used up"):
        state.reseeded([1, 2])


def test_an_environment_goes_on_by_another_seed(tiny_world):
    env = WorldEnv(tiny_world)
    env.reset(seed=2)
    env.step(1)
    saved, generator = env.save_state(), env.np_random.bit_generator.state

    def future(seed):
        env.restore_state(saved, seed)
        return env.step(0)[0]

    first = future(None)
    assert np.array_equal(future(None), first) and np.array_equal(future(11), future(11))
    assert not np.array_equal(future(11), first) and not np.array_equal(future(11), future(12))
    assert env.np_random.bit_generator.state == generator
    other = gym.make("sfv_world/World-v0", world=tiny_world)
    other.reset(seed=0)
    other.unwrapped.restore_state(saved, seed=11)
    assert np.array_equal(other.step(0)[0], future(11))


def test_forked_rows_go_on_by_seeds_of_their_own(tiny_world):
    envs = WorldVectorEnv(1, world=tiny_world, max_episode_steps=3)
    envs.reset(seed=0)
    envs.step([1])
    forks = WorldVectorEnv(4, world=tiny_world, max_episode_steps=3)

    def futures(seed, steps=1):
        forks.restore_state(envs.save_state([0, 0, 0, 0]), seed=seed)
        return [forks.step([0] * 4)[0] for _ in range(steps)]

    alike, apart = futures(None)[0], futures(30)[0]
    assert all(np.abs(alike[0].astype(int) - frame).max() <= 1 for frame in alike[1:])
    assert len({frame.tobytes() for frame in apart}) == 4
    some = futures([None, 31, None, 31])[0]
    assert np.array_equal(some[[0, 2]], alike[[0, 2]]) and np.array_equal(some[1], apart[1])
    assert np.abs(some[1].astype(int) - some[3]).max() <= 1
    late = futures(30, steps=6)  # beyond the ends of the episodes: those that follow differ, too
    assert len({frame.tobytes() for frame in late[-1]}) == 4
    before = forks.save_state()
    for wrong in ([1, 2], [1, 2, 3, -4], "4"):
        with pytest.raises(ValueError, match="seed: expected 4 integers from 0, or None"):
            forks.restore_state(envs.save_state([0, 0, 0, 0]), seed=wrong)
    assert np.array_equal(forks.save_state().rows.seeds, before.rows.seeds)


def test_imagined_frames_are_begun_at_without_more_noise(tiny_world):
    env, envs = WorldEnv(tiny_world), WorldVectorEnv(2, world=tiny_world)
    options = {"frames": FRAMES, "actions": ACTIONS, "noised": True}
    env.reset(seed=3, options={name: x if name == "noised" else x[1] for name, x in options.items()})
    envs.reset(seed=[9, 3], options=options)
    seeds = env.save_state().row.seeds
    state = tiny_world.reset(FRAMES[1:], ACTIONS[1:], seeds, noised=True)
    assert torch.equal(env.save_state().row.stream.tokens, state.stream.tokens)
    torch.testing.assert_close(envs.save_state([1]).rows.stream.tokens, state.stream.tokens)
    env.reset(seed=3, options={"frames": FRAMES[1], "actions": ACTIONS[1]})
    assert not torch.equal(env.save_state().row.stream.tokens, state.stream.tokens)
    for one in (env, envs):
        with pytest.raises(ValueError, match="options: expected 'frames' with 'actions' and 'noised'"):
            one.reset(options={"noised": True})


def test_a_world_says_what_of_a_saved_environment_it_steps(tiny_world, tmp_path, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which would refuse it before the world does
    env = WorldEnv(tiny_world)
    env.reset(seed=2)
    saved = env.save_state()
    for act in (lambda: tiny_world.step(saved, [0]), lambda: tiny_world.save_state(saved, tmp_path / "state")):
        with pytest.raises(ValueError, match="state: expected a WorldState, got EnvState. .* `row` or `rows`"):
            act()
    tiny_world.save_state(saved.row, tmp_path / "state")
    _, output = tiny_world.step(tiny_world.load_state(tmp_path / "state"), [1])
    assert np.array_equal(output.frames[0].numpy(), env.step(1)[0])
