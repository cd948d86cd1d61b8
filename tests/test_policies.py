"""Policies hold their actions, repeat themselves from a seed, and load from files or say why not."""

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from sfv_world.agents.policies import AgentPolicy, HeldRandomPolicy, load_policy

SPACES = [spaces.Discrete(1000), spaces.Box(-1, 1, (2,)), spaces.Dict(a=spaces.MultiBinary(30), b=spaces.Box(0, 1))]


def run_lengths(policy: HeldRandomPolicy, steps: int) -> np.ndarray:
    """How long each action was held, for a space in which no two draws are equal."""
    actions = [policy(None) for _ in range(steps)]
    changes = [t for t in range(1, steps) if repr(actions[t]) != repr(actions[t - 1])]
    return np.diff([0, *changes])


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_held_random_policy(space: spaces.Space) -> None:
    policy = HeldRandomPolicy(space, hold=(2, 5), seed=0)
    assert policy(None) in space
    policy.reset(1)
    lengths = run_lengths(policy, 4000)
    counts = np.bincount(lengths, minlength=6)
    # An action drawn twice in a row looks held for longer: a draw in a thousand here.
    assert counts[:2].sum() == 0 and counts[6:].sum() <= 5
    assert np.abs(counts[2:6] / len(lengths) - 0.25).max() < 0.04


def test_a_stride_holds_actions_for_whole_strides() -> None:
    policy = HeldRandomPolicy(spaces.Box(-1, 1), hold=(1, 3), seed=0, stride=4)
    lengths = run_lengths(policy, 400)
    assert set(lengths) == {4, 8, 12}


def test_seed_decides_everything() -> None:
    space = spaces.Discrete(5)
    space.seed(9)
    state = space.np_random.bit_generator.state
    a, b = HeldRandomPolicy(space, seed=1), HeldRandomPolicy(space, seed=2)
    for policy in (a, b):
        policy(None)
        policy.reset(7)
    assert [a(None) for _ in range(50)] == [b(None) for _ in range(50)]
    assert space.np_random.bit_generator.state == state, "the environment's own generator is left alone"


def test_policies_without_seeds_have_nothing_in_common() -> None:
    space = spaces.Discrete(1000, seed=0)
    draws = [[policy(None) for _ in range(9)] for policy in (HeldRandomPolicy(space, (1, 1)) for _ in range(2))]
    assert draws[0] != draws[1]


def test_reset_without_seed_goes_on() -> None:
    policy = HeldRandomPolicy(spaces.Box(0, 1), hold=(9, 9), seed=0)
    first = policy(None)
    policy.reset()
    assert policy(None) != first


@pytest.mark.parametrize("hold", [(0, 3), (4, 2)])
def test_hold_is_checked(hold: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="hold: expected 1 <= least <= greatest"):
        HeldRandomPolicy(spaces.Discrete(2), hold)


@pytest.mark.parametrize("name", ["agent", "cartpole-dqn", "DQN_12"])
def test_saved_agent_is_loaded(tmp_path: Path, name: str) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    env = gym.make("CartPole-v1")
    agent = sb3.DQN("MlpPolicy", env, seed=0, device="cpu", buffer_size=10)
    agent.save(tmp_path / name)
    policy = load_policy(tmp_path / f"{name}.zip", env, deterministic=True)
    assert isinstance(policy, AgentPolicy) and isinstance(policy.agent, sb3.DQN)
    observation, _ = env.reset(seed=0)
    policy.reset(0)
    for _ in range(5):
        action = policy(observation)
        assert action in env.action_space and action == agent.predict(observation, deterministic=True)[0]
        observation, *_ = env.step(action)


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    sb3 = pytest.importorskip("stable_baselines3")
    env = gym.make("CartPole-v1")
    with pytest.raises(ValueError, match="'random' or the path.*'missing.zip'.*no such file"):
        load_policy("missing.zip", env)
    (tmp_path / "notes.txt").write_text("not an agent")
    with pytest.raises(ValueError, match="the file is no .zip"):
        load_policy(tmp_path / "notes.txt", env)
    (tmp_path / "broken.zip").write_text("not an agent")
    with pytest.raises(ValueError, match="PPO or A2C or DQN or SAC or TD3.*broken.zip.*file name"):
        load_policy(tmp_path / "broken.zip", env)
    sb3.A2C("MlpPolicy", gym.make("Acrobot-v1"), device="cpu").save(tmp_path / "a2c.zip")
    with pytest.raises(ValueError, match=r"agent of A2C with observation space Box\(.*a2c.zip"):
        load_policy(tmp_path / "a2c.zip", env)
