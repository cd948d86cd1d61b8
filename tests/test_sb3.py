"""The Stable-Baselines3 skin: its conventions, its wrappers, and an agent that trains in it."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import VecFrameStack, VecMonitor, VecTransposeImage

from sfv_world.envs.sb3 import WorldVecEnv
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.loading import load_world

INFO = {
    *("log_likelihood", "bits_per_dim", "sweeps", "certificate", "guided", "termination_probability", "frames_behind"),
    "TimeLimit.truncated",
}


@pytest.fixture
def envs(tiny_world):
    return WorldVecEnv(
        WorldVectorEnv(3, world=tiny_world, max_episode_steps=5, autoreset_mode="SameStep", render_mode="rgb_array")
    )


def test_conventions(envs):
    envs.seed(0)
    first = envs.reset()
    ended = limited = 0
    for _ in range(12):
        frames, rewards, dones, infos = envs.step(np.zeros(3, int))
        assert frames.dtype == np.uint8 and rewards.dtype == np.float32
        for row, done in enumerate(dones):
            assert infos[row].keys() == INFO | ({"terminal_observation"} if done else set())
            if done:
                ended += 1
                limited += infos[row]["TimeLimit.truncated"]
                assert infos[row]["terminal_observation"].shape == (16, 24, 3)
                assert not np.array_equal(infos[row]["terminal_observation"], frames[row])
    assert ended >= 6 and limited > 0
    envs.seed(0)
    np.testing.assert_array_equal(envs.reset(), first)


@pytest.mark.parametrize("ends", [True, False])
def test_an_end_at_the_time_limit_is_an_end(build_world, ends):
    world = load_world(build_world())
    with torch.no_grad():
        world.model.heads.mlp[-1].bias[0] = 100.0 if ends else -100.0
    envs = WorldVecEnv(WorldVectorEnv(2, world=world, max_episode_steps=1, autoreset_mode="SameStep"))
    envs.reset()
    _, _, dones, infos = envs.step(np.zeros(2, int))
    assert dones.all() and [info["TimeLimit.truncated"] for info in infos] == [not ends] * 2  # no value is bootstrapped


@pytest.mark.parametrize("space", [spaces.Discrete(3, start=1), spaces.MultiDiscrete([2, 2], start=[0, 1])])
def test_actions_count_from_0(build_world, space):
    envs = WorldVectorEnv(2, world=build_world(action_space=space), autoreset_mode="SameStep")
    with pytest.raises(ValueError, match=r"envs: expected actions that count from 0, .*got (Multi)?Discrete\("):
        WorldVecEnv(envs)


def test_attributes_and_methods(envs):
    envs.reset()
    assert envs.get_attr("max_episode_steps") == [5, 5, 5]
    assert envs.get_attr("max_episode_steps", indices=[1]) == [5]
    assert envs.get_attr("observation_space") == [envs.observation_space] * 3
    assert envs.get_attr("action_space", indices=0) == [envs.action_space]
    envs.set_attr("max_episode_steps", 7)
    assert envs.envs.max_episode_steps == 7
    assert envs.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * 3
    states = envs.env_method("save_state")
    assert [len(state.rows) for state in states] == [1, 1, 1]
    frames = envs.step(np.zeros(3, int))[0]
    for row, state in enumerate(states):
        envs.env_method("restore_state", state, indices=row)
    again = envs.step(np.zeros(3, int))[0]
    assert np.abs(frames.astype(int) - again).max() <= 1
    for call in (lambda: envs.set_attr("max_episode_steps", 7, indices=0), lambda: envs.env_method("reset", indices=0)):
        with pytest.raises(ValueError, match="indices: expected all rows"):
            call()


def test_options_begin_rows(envs):
    frames = np.random.default_rng(0).integers(256, size=(3, 2, 16, 24, 3), dtype=np.uint8)
    envs.set_options([{"frames": frame, "actions": np.array([1])} for frame in frames])
    np.testing.assert_array_equal(envs.reset(), frames[:, -1])
    envs.set_options([{"frames": frames[0]}, {}, {}])
    envs.seed(5)
    with pytest.raises(ValueError, match="options: expected the same keys for every row, or none"):
        envs.reset()
    envs.set_options({})  # what was refused is mended, and all else is as it was set
    seeded = envs.reset()
    assert not np.array_equal(envs.reset(), seeded)  # both were for one reset
    envs.seed(5)
    np.testing.assert_array_equal(envs.reset(), seeded)


def test_rows_are_rendered(envs, tiny_world):
    assert envs.metadata["render_fps"] == 9 and envs.render_mode == "rgb_array"
    envs.reset()
    frames = envs.step(np.zeros(3, int))[0]
    np.testing.assert_array_equal(envs.get_images(), frames)
    picture = VecMonitor(envs).render()  # two rows of two, the last place black
    np.testing.assert_array_equal(picture[:16], np.hstack(frames[:2]))
    np.testing.assert_array_equal(picture[16:], np.hstack([frames[2], np.zeros_like(frames[2])]))
    blind = WorldVecEnv(WorldVectorEnv(2, world=tiny_world, autoreset_mode="SameStep"))
    assert blind.render_mode is None
    with pytest.warns(UserWarning, match="render_mode: expected 'rgb_array', got None"):
        assert blind.get_images() == [None, None]


def test_wrappers_and_an_agent(envs):
    wrapped = VecFrameStack(VecTransposeImage(VecMonitor(envs)), 2)
    assert wrapped.reset().shape == (3, 6, 16, 24)
    agent = PPO("MlpPolicy", wrapped, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    agent.learn(48)
    assert len(agent.ep_info_buffer) > 0


def test_other_conventions_are_refused(tiny_world):
    with pytest.raises(ValueError, match="SameStep"):
        WorldVecEnv(WorldVectorEnv(2, world=tiny_world))
