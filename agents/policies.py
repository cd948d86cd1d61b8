"""Policies that need no world model: held random actions, and agents saved by Stable-Baselines3.

A policy is called with an observation and returns an action; `reset` is called once before each episode. Data
collection and evaluation know nothing else of it.
"""

from __future__ import annotations

import copy
import re
import secrets
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import gymnasium as gym
import numpy as np


@runtime_checkable
class Policy(Protocol):
    """What collection and evaluation ask of whoever acts."""

    def reset(self, seed: int | None = None) -> None:
        """Begins an episode; with a seed, everything random in it follows from that seed."""

    def __call__(self, observation: Any) -> Any:
        """Returns the action to take on seeing `observation`."""


class HeldRandomPolicy:
    """Draws a random action and holds it for a random number of steps.

    Actions drawn anew at every step cancel each other out and an agent stays where it is; held ones go places, so the
    data shows more of the world.

    Args:
        action_space: where actions are drawn from; the policy works on a copy with a generator of its own.
        hold: least and greatest number of steps an action is held, both included; drawn uniformly.
        stride: actions change only at multiples of so many steps, and `hold` counts in them.
        seed: seed of the actions and of the holding times.

    Raises:
        ValueError: if `hold` is not an increasing pair of positive numbers.

    Example:
        >>> policy = HeldRandomPolicy(gym.spaces.Discrete(4), hold=(3, 3), seed=0)
        >>> actions = [int(policy(None)) for _ in range(6)]
        >>> len(set(actions[:3])), len(set(actions[3:]))
        (1, 1)
    """

    def __init__(
        self, action_space: gym.Space[Any], hold: tuple[int, int] = (1, 8), seed: int | None = None, *, stride: int = 1
    ):
        if not 1 <= hold[0] <= hold[1]:
            raise ValueError(f"hold: expected 1 <= least <= greatest number of steps, got {hold}.")
        self._space = copy.deepcopy(action_space)
        self._hold, self._stride = hold, stride
        self.reset(secrets.randbits(63) if seed is None else seed)

    def reset(self, seed: int | None = None) -> None:
        if seed is not None:
            self._rng = np.random.default_rng(seed)
            self._space.seed(int(self._rng.integers(2**31)))
        self._remaining = 0

    def __call__(self, observation: Any) -> Any:
        if self._remaining == 0:
            self._action = self._space.sample()
            self._remaining = self._stride * int(self._rng.integers(self._hold[0], self._hold[1] + 1))
        self._remaining -= 1
        return self._action


class AgentPolicy:
    """A trained Stable-Baselines3 agent as a policy.

    Args:
        agent: anything with Stable-Baselines3's `predict`.
        deterministic: take the most likely action instead of sampling. Samples come from torch's global generator,
            which `reset` leaves alone: seeds of this policy do not repeat an episode.
    """

    def __init__(self, agent: Any, *, deterministic: bool = False):
        self.agent = agent
        self.deterministic = deterministic

    def reset(self, seed: int | None = None) -> None:
        pass

    def __call__(self, observation: Any) -> Any:
        action, _ = self.agent.predict(observation, deterministic=self.deterministic)
        # predict gives a Discrete action as a 0-d array, which is in no Discrete space.
        return action.item() if np.ndim(action) == 0 else action


ALGORITHMS = ("PPO", "A2C", "DQN", "SAC", "TD3")
"""Stable-Baselines3 algorithms whose saved agents can be loaded."""


def load_policy(
    path_or_name: str | Path,
    env: gym.Env[Any, Any],
    *,
    hold: tuple[int, int] = (1, 8),
    stride: int = 1,
    seed: int | None = None,
    deterministic: bool = False,
) -> Policy:
    """Loads a policy for an environment.

    Args:
        path_or_name: "random", or the path of an agent saved by Stable-Baselines3 (.zip). Its algorithm is taken from
            the file name where that names one ("doom-ppo.zip"); otherwise all of PPO, A2C, DQN, SAC and TD3 are tried.
        env: the environment it will act in; the agent must have been trained with the same spaces.
        hold: least and greatest number of steps a random action is held, in multiples of `stride` steps.
        stride: see `HeldRandomPolicy`.
        seed: seed of the random policy.
        deterministic: whether a saved agent takes its most likely action instead of sampling.

    Raises:
        ValueError: if there is no such policy, or it does not fit the environment.

    Example:
        >>> env = gym.make("CartPole-v1")
        >>> load_policy("random", env, seed=1)(None) in env.action_space
        True
    """
    if str(path_or_name) == "random":
        return HeldRandomPolicy(env.action_space, hold, seed, stride=stride)
    path = Path(path_or_name)
    if path.suffix != ".zip" or not path.is_file():
        found = "there is no such file" if not path.is_file() else "the file is no .zip"
        raise ValueError(
            f"policy: expected 'random' or the path of a Stable-Baselines3 agent (.zip), got {str(path)!r} ({found})."
        )
    return AgentPolicy(_load_agent(path, env), deterministic=deterministic)


def _load_agent(path: Path, env: gym.Env[Any, Any]) -> Any:
    import stable_baselines3  # slow to import, and random play does not need it

    words = re.split(r"[^A-Z0-9]+", path.stem.upper())
    named = [name for name in ALGORITHMS if name in words]
    reasons = []
    for name in named or ALGORITHMS:
        try:
            return getattr(stable_baselines3, name).load(path, env=env, device="cpu")
        except Exception as error:  # a file of another algorithm fails in whatever way its contents happen to
            reasons.append(f"{name}: {type(error).__name__}: {error}")
    raise ValueError(
        f"policy: expected an agent of {' or '.join(named or ALGORITHMS)} with observation space "
        f"{env.observation_space} and action space {env.action_space}, got {str(path)!r}, which does not load as one "
        f"({'; '.join(reasons)}). "
        "Put the algorithm's name into the file name, and use the environment and frame size it was trained with."
    )
