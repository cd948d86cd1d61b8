"""A skin that makes `WorldVectorEnv` a Stable-Baselines3 `VecEnv`: agents train in it as in any other.

Its conventions: rows begin anew in the step that ends them, the last frame is in `infos[i]["terminal_observation"]`, and
`infos[i]["TimeLimit.truncated"]` tells a time limit from a termination.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from sfv_world.envs.vector_env import WorldVectorEnv


class WorldVecEnv(VecEnv):
    """A batch of learned worlds for Stable-Baselines3.

    Args:
        envs: a `WorldVectorEnv` with same-step autoreset and NumPy output.

    Raises:
        ValueError: if the environment resets or returns frames in another way, or its actions do not count from 0.

    Example:
        >>> envs = WorldVectorEnv(8, world="doom-basic", max_episode_steps=75, autoreset_mode="SameStep")  # doctest: +SKIP
        >>> PPO("CnnPolicy", WorldVecEnv(envs)).learn(10_000)  # doctest: +SKIP
    """

    def __init__(self, envs: WorldVectorEnv):
        if not isinstance(envs, WorldVectorEnv):
            raise ValueError(
                f"envs: expected a WorldVectorEnv, as `gymnasium.make_vec` makes it, got {type(envs).__name__}."
            )
        if envs.autoreset_mode is not AutoresetMode.SAME_STEP or envs.output != "numpy":
            raise ValueError(
                "envs: expected autoreset_mode='SameStep' and output='numpy', as Stable-Baselines3 does it, got "
                f"{envs.autoreset_mode.value!r} and {envs.output!r}."
            )
        if np.any(getattr(envs.single_action_space, "start", 0)):
            raise ValueError(
                f"envs: expected actions that count from 0, as Stable-Baselines3's do, got {envs.single_action_space}. "
                "Record again behind a wrapper that counts so (`gymnasium.wrappers.TransformAction`)."
            )
        self.envs = envs  # first, as `VecEnv` asks it for the render mode
        super().__init__(envs.num_envs, envs.single_observation_space, envs.single_action_space)
        self.metadata = {**envs.metadata, **self.metadata}
        self._actions: np.ndarray | None = None

    def reset(self) -> VecEnvObs:
        """Resets all rows, with the seeds and options that were set; if they are refused, they stay set."""
        seed = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        given: list[dict[str, Any]] = [option or {} for option in self._options]
        options: dict[str, Any] = {}
        if any(given):
            if any(option.keys() != given[0].keys() for option in given):
                raise ValueError("options: expected the same keys for every row, or none.")
            options = {name: np.stack([option[name] for option in given]) for name in given[0]}
        frames, _ = self.envs.reset(seed=seed, options=options)
        self._reset_seeds()
        self._reset_options()
        self.reset_infos = [{} for _ in range(self.num_envs)]
        return frames

    def step_async(self, actions: np.ndarray) -> None:
        """Keeps the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """Steps all rows."""
        frames, rewards, terminated, truncated, infos = self.envs.step(self._actions)
        final = infos.get("final_info", {})
        rows: list[dict[str, Any]] = []
        for row, ended in enumerate(terminated | truncated):
            source = final if ended else infos
            names = [name for name in source if f"_{name}" in source and name not in ("final_obs", "final_info")]
            info = {name: source[name][row].item() for name in names}
            info["TimeLimit.truncated"] = bool(truncated[row] and not terminated[row])
            if ended:
                info["terminal_observation"] = infos["final_obs"][row]
            rows.append(info)
        return frames, rewards.astype(np.float32), terminated | truncated, rows

    def get_images(self) -> Sequence[np.ndarray | None]:
        """The current frame of every row, in render mode "rgb_array"; `render` makes one picture of them."""
        return self.envs.render() or [None] * self.num_envs

    def close(self) -> None:
        """Closes the batch."""
        self.envs.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of the batch, or a row's own space, once for each row."""
        own = f"single_{attr_name}" if attr_name in ("observation_space", "action_space") else attr_name
        return [getattr(self.envs, own) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Sets an attribute of the batch; rows cannot differ."""
        self._check_all(attr_name, indices)
        setattr(self.envs, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Calls a method for rows: `save_state()` of each, `restore_state(state)` in each, others once for all rows together."""
        rows: Sequence[int] = list(self._get_indices(indices))
        if method_name in ("save_state", "restore_state"):
            method = getattr(self.envs, method_name)
            return [method(*method_args, rows=[row], **method_kwargs) for row in rows]
        self._check_all(method_name, indices)
        return [getattr(self.envs, method_name)(*method_args, **method_kwargs)] * len(rows)

    def _check_all(self, name: str, indices: VecEnvIndices) -> None:
        """Raises a ValueError if not all rows are meant."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"indices: expected all rows, which share {name!r}, got {indices!r}.")

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: VecEnvIndices = None) -> list[bool]:
        """Rows have no wrappers of their own."""
        return [False for _ in self._get_indices(indices)]
