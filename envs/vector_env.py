"""Many imagined worlds at once: rows of one batch, on one device, behind Gymnasium's vector API.

All rows march in lockstep; a row that resets joins the others at their clock. Row i is what `WorldEnv` with the same seed
would be, whatever the other rows do.
"""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from sfv_world.control.spaces import map_actions
from sfv_world.envs.world_env import open_world, step_info, warn_if_unconverged
from sfv_world.state import WorldOutput, WorldState
from sfv_world.transfer import Fetch, to_device, to_host
from sfv_world.world import World


@dataclass(frozen=True)
class RowsState:
    """Where rows stand: what `WorldVectorEnv.save_state` gives and `WorldVectorEnv.restore_state` takes."""

    rows: WorldState
    """The world's state."""
    steps: Int[np.ndarray, "b"]
    """Steps of each row's episode."""
    ended: Bool[np.ndarray, "b"]
    """Whether each row's episode has ended."""
    generators: list[np.random.Generator]
    """What seeds each row's later episodes."""

    def __getitem__(self, rows: Any) -> "RowsState":
        """A copy of rows: selected, repeated or reordered by a slice, a mask or numbers."""
        index = np.atleast_1d(np.arange(len(self.rows))[rows])
        generators = [copy.deepcopy(self.generators[row]) for row in index]  # one by one: a row may be there twice
        return RowsState(self.rows[index], self.steps[index], self.ended[index], generators)


class WorldVectorEnv(VectorEnv[Any, Any, Any]):
    """A batch of learned worlds: `gymnasium.make_vec("sfv_world/World-v0", num_envs=32, world=...)`.

    Spaces, rewards, terminations and infos are those of `WorldEnv`, batched as Gymnasium does it. Rows of a world on a released
    model are one batch while they are at the same place of their chunks, as those are that began at the same step.

    Args:
        num_envs: rows.
        world: the name of a shipped world, a world's folder, or a `World`.
        device: where to load the world, by default the CPU; a `World` stays where it is.
        dtype: what its Transformers compute in (see `load_world`); a `World` stays as it is.
        render_mode: None or "rgb_array".
        max_episode_steps: steps after which a row is truncated; none: never.
        autoreset_mode: when a row that ended begins anew: at the next step ("NextStep", the default), at the same step ("SameStep":
            its last frame and info are then in `info["final_obs"]` and `info["final_info"]`), or only when `reset` is called for
            it ("Disabled"; so it must be where the world has no start frames).
        output: "numpy" arrays, or "torch" tensors that stay on the world's device (observations, rewards, terminations,
            truncations and infos). On a GPU, a step then returns before it is computed, unless rows that end are to begin anew
            in the same step; which rows ended, and warnings, are taken in by the step after it. Actions and options may be
            tensors either way; they are read on the host, which waits for them.
        decoding: fields of `DecodingConfig` to set.

    Example:
        >>> import gymnasium as gym, sfv_world
        >>> envs = gym.make_vec("sfv_world/World-v0", num_envs=8, world="doom-basic", max_episode_steps=75)  # doctest: +SKIP
        >>> frames, infos = envs.reset(seed=0)  # doctest: +SKIP
        >>> frames, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())  # doctest: +SKIP
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        world: World | str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        output: str = "numpy",
        **decoding: Any,
    ):
        counts = {"num_envs": num_envs}
        if max_episode_steps is not None:
            counts["max_episode_steps"] = max_episode_steps
        for name, count in counts.items():
            if not isinstance(count, int | np.integer) or count < 1:
                raise ValueError(f"{name}: expected an integer of at least 1, got {count!r}.")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode: expected None or 'rgb_array', got {render_mode!r}.")
        if output not in ("numpy", "torch"):
            raise ValueError(f"output: expected 'numpy' or 'torch', got {output!r}.")
        self.world, fps = open_world(world, device, dtype, decoding)
        self.num_envs, self.render_mode, self.output = num_envs, render_mode, output
        self.max_episode_steps = max_episode_steps
        if autoreset_mode not in [*AutoresetMode, *(mode.value for mode in AutoresetMode)]:
            modes = ", ".join(repr(mode.value) for mode in AutoresetMode)
            raise ValueError(f"autoreset_mode: expected one of {modes}, got {autoreset_mode!r}.")
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        if self.world.starts is None and self.autoreset_mode is not AutoresetMode.DISABLED:
            raise ValueError(
                f"autoreset_mode: expected 'Disabled' for {self.world.name}, which has no start frames to begin rows at, "
                f"got {self.autoreset_mode.value!r}. Disable it, and reset rows that ended to frames (reset_mask)."
            )
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = spaces.Box(0, 255, self.world.observation_shape, np.uint8)
        self.single_action_space = copy.deepcopy(self.world.action_space)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._state: WorldState | None = None
        self._steps = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, bool)
        self._pending: Fetch | None = None
        self._generators = [seeding.np_random()[0] for _ in range(num_envs)]

    @property  # type: ignore[misc]  # as Gymnasium's own vector envs do
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """What seeds each row's episodes."""
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of each row's generator."""
        return tuple(generator.bit_generator.seed_seq.entropy for generator in self._generators)  # type: ignore[attr-defined]

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Begins episodes at observed frames.

        Args:
            seed: of the first row, the others following it; or one for each row, None for those whose generators go on.
            options: "frames", (num_envs, K, H, W, 3) uint8, K as in `WorldEnv`, with "actions", the num_envs x K-1 actions between
                them, and "noised": True if they are imagined ones (see `World.reset`); by default, rows begin at start frames
                that came with the world. "reset_mask", (num_envs,) bool: rows to
                reset.

        Returns:
            The last observed frames (those of rows that were not reset are the current ones), and an empty info.

        Raises:
            ValueError: if an option or a seed is not as expected; nothing has changed then.
        """
        self._settle()
        options = options or {}
        mask, observed = self._options(options)
        fresh = _seeded(self._generators, _seeds(seed, self.num_envs))
        generators = [new if begins else old for new, old, begins in zip(fresh, self._generators, mask, strict=True)]
        previous = self._generators, self._state
        self._generators = generators
        if mask.all():
            self._state = None
        try:
            self._begin(np.flatnonzero(mask), observed, bool(options.get("noised", False)))
        except ValueError:
            self._generators, self._state = previous
            raise
        return self._out(self._current("reset").frames), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Imagines the next frame of every row.

        Raises:
            ResetNeeded: if no episode has begun, or, without autoreset, if one has ended.
            ValueError: if actions are not of the action space; nothing has changed then.
        """
        state, disabled = self._current("step"), self.autoreset_mode is AutoresetMode.DISABLED
        if disabled:
            self._settle()
        if disabled and self._ended.any():
            rows = np.flatnonzero(self._ended).tolist()
            raise ResetNeeded(
                f"step: expected episodes that go on, got ended ones in rows {rows}. Reset them (reset_mask)."
            )
        if actions is None:  # which a world takes for unknown ones
            raise ValueError(
                f"actions: expected those of {self.num_envs} rows, of {self.single_action_space}, got None."
            )
        try:
            self._state, output = self.world.step(state, actions)
        except BaseException:
            self._state = None if state.spent else state  # interrupted halfway, the episodes are lost
            raise
        self._settle()  # as late as possible: the device says how the step before ended while this one is prepared
        self._steps += 1
        resetting, acting = self._ended, ~self._ended
        self._ended = np.zeros_like(acting)
        if self.max_episode_steps is not None:
            self._ended = (self._steps >= self.max_episode_steps) & acting
        goes_on, truncated = self._tensor(acting), self._tensor(self._ended.copy())
        terminated = output.terminated & goes_on
        self._pending = Fetch([terminated, torch.where(goes_on, output.certificate, 0.0)])
        rewards = torch.where(goes_on, output.reward, 0.0).double()
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            self._settle()
            ended = self._ended.copy()
            info = self._info(output, acting & ~ended)
            if ended.any():
                info |= self._final(output, ended)
            self._begin(np.flatnonzero(ended | resetting))
        else:
            info = self._info(output, acting)
            self._begin(np.flatnonzero(resetting))
        results = self._out((self._current("step").frames, rewards, terminated, truncated, info))
        if self.output == "numpy":
            self._settle()
            if "final_obs" in info:
                frames, gone = results[-1]["final_obs"], results[-1]["_final_obs"]
                results[-1]["final_obs"] = objects = np.full(self.num_envs, None)
                for row in np.flatnonzero(gone):
                    objects[row] = frames[row]
        return results

    def render(self) -> tuple[np.ndarray, ...] | None:
        """The current frames, each the last of a step, in render mode "rgb_array"."""
        if self.render_mode is None:
            gym.logger.warn("render_mode: expected 'rgb_array', got None. Give it to gymnasium.make_vec.")
            return None
        frames = self._current("render").frames.reshape(self.num_envs, -1, *self.world.frame_shape)[:, -1]
        return tuple(Fetch([frames]).wait()[0])

    def save_state(self, rows: Any = slice(None)) -> RowsState:
        """Where rows stand, as a value: a copy that later steps do not change."""
        index = np.atleast_1d(np.arange(self.num_envs)[rows])
        self._settle()
        state = self._current("save_state")[index]
        generators = [copy.deepcopy(self._generators[row]) for row in index]
        return RowsState(state, self._steps[index], self._ended[index], generators)

    def restore_state(self, saved: RowsState, rows: Any = slice(None), seed: Any = None) -> None:
        """Puts rows where those of a saved state stood, with what decides what comes: they draw what was drawn the first time.

        With `seed`, of the first row or one for each as in `reset`, they draw other futures of the same past. If all rows are
        restored, in which case they need not have begun, they go on bit for bit as they did; some of them join the others at
        their clock, and do so to float32 rounding.

        Raises:
            ResetNeeded: if some rows are to join others that have not begun.
            ValueError: if the state is none, of another number of rows, or of another world, rows are named twice, or seeds are
                not as expected; nothing has changed then.
        """
        self._settle()
        index = np.atleast_1d(np.arange(self.num_envs)[rows])
        if len(np.unique(index)) < len(index):
            raise ValueError(
                f"rows: expected each row once, got {index.tolist()}. Repeat rows of the saved state instead."
            )
        if not isinstance(saved, RowsState) or len(saved.rows) != len(index):
            got = f"{len(saved.rows)} rows" if isinstance(saved, RowsState) else type(saved).__name__
            raise ValueError(f"state: expected a saved state of {len(index)} rows, got {got}.")
        self.world.check_state(saved.rows)
        seeds = _seeds(seed, len(index))
        generators, wanted = _seeded(saved.generators, seeds), saved.rows
        if seed is not None:
            of_rows = zip(wanted.seeds, seeds, generators, strict=True)
            wanted = wanted.reseeded([old if one is None else own.integers(2**63) for old, one, own in of_rows])
        if len(index) == self.num_envs:
            self._state = wanted[np.argsort(index)]
        else:
            current = self._current("restore_state")
            current.put(index, self.world.at_clock(wanted, current.clock))
        self._steps[index], self._ended[index] = saved.steps, saved.ended
        for row, generator in zip(index, generators, strict=True):
            self._generators[row] = generator

    def _options(self, options: dict[str, Any]) -> tuple[np.ndarray, tuple[Any, ...] | None]:
        unknown = options.keys() - {"frames", "actions", "noised", "reset_mask"}
        if unknown or ({"actions", "noised"} & options.keys() and "frames" not in options):
            raise ValueError(
                f"options: expected 'frames' with 'actions' and 'noised', 'reset_mask', or none of them, got {sorted(options)}."
            )
        mask = to_host(options.get("reset_mask", np.ones(self.num_envs, bool)), "reset_mask")
        if mask.dtype != bool or mask.shape != (self.num_envs,) or not mask.any():
            raise ValueError(
                f"reset_mask: expected ({self.num_envs},) bool with at least one True, got {mask.dtype} {mask.shape}."
            )
        if self._state is None and not mask.all():
            raise ResetNeeded(
                "reset_mask: expected all rows to have begun, got none that has. Reset all of them first."
            )
        if "frames" not in options:
            return mask, None

        def masked(name: str, array: np.ndarray) -> np.ndarray:
            if array.shape[:1] != mask.shape:
                raise ValueError(f"{name}: expected those of {self.num_envs} rows, got shape {array.shape}.")
            return array[mask]

        frames, actions = masked("frames", to_host(options["frames"], "frames")), options.get("actions")
        if actions is not None:
            actions = map_actions(partial(masked, "actions"), self.single_action_space, actions)
        return mask, (frames, actions)

    def _begin(self, rows: np.ndarray, observed: tuple[Any, ...] | None = None, noised: bool = False) -> None:
        """Begins episodes in rows: at the clock of the others, or alone if there are none."""
        if len(rows) == 0:
            return
        clock = None if self._state is None else self._state.clock
        seeds = [self._generators[row].integers(2**63) for row in rows]
        if observed is None:
            fresh = self.world.start(seeds, clock)
        else:
            frames, past = observed
            fresh = self.world.reset(frames, past, seeds, clock, noised=noised)
        if self._state is None:
            self._state = fresh
        else:
            self._state.put(rows, fresh)
        self._steps[rows], self._ended[rows] = 0, False

    def _info(self, output: WorldOutput, rows: np.ndarray) -> dict[str, Any]:
        """Infos of rows in Gymnasium's vector convention: an array for each entry, and which rows have it."""
        mask, info = self._tensor(rows), {}
        for name, values in step_info(output).items():
            info[name], info[f"_{name}"] = torch.where(mask, values, values.new_zeros(())), mask
        return info

    def _final(self, output: WorldOutput, rows: np.ndarray) -> dict[str, Any]:
        """What Gymnasium's convention says of rows that ended and began anew in the same step."""
        mask, info = self._tensor(rows), self._info(output, rows)
        return {"final_obs": output.frames, "_final_obs": mask, "final_info": info, "_final_info": mask}

    def _settle(self) -> None:
        """Takes in what the device says of the last step: which rows it ended, and which did not converge."""
        if self._pending is not None:
            (terminated, certificates), self._pending = self._pending.wait(), None
            self._ended |= terminated
            warn_if_unconverged(certificates, self.world, stacklevel=4)

    def _current(self, name: str) -> WorldState:
        if self._state is None:
            raise ResetNeeded(f"{name}: expected episodes that have begun, got none. Call reset() first.")
        return self._state

    def _tensor(self, array: np.ndarray) -> Tensor:
        return to_device(array, self.world.device)

    def _out(self, results: Any) -> Any:
        """Results, in tuples and dicts, as the caller wants them: tensors of his own, or arrays, all fetched at once."""
        tensors, structure = tree_flatten(results)
        return tree_unflatten(
            [x.clone() for x in tensors] if self.output == "torch" else Fetch(tensors).wait(), structure
        )


def _seeds(seed: Any, rows: int) -> list[int | None]:
    """A seed a row, or none for those whose generators go on: the first one's and those that follow it, or one for each."""
    if isinstance(seed, int | np.integer):
        seed = [int(seed) + row for row in range(rows)]
    seeds = [seed] * rows if np.ndim(seed) == 0 else list(seed)
    numbers = [seed for seed in seeds if seed is not None]
    if len(seeds) != rows or not all(isinstance(n, int | np.integer) and n >= 0 for n in numbers):
        raise ValueError(f"seed: expected {rows} integers from 0, or None, one per row, got {seeds}.")
    return [None if seed is None else int(seed) for seed in seeds]


def _seeded(generators: list[np.random.Generator], seeds: list[int | None]) -> list[np.random.Generator]:
    """Copies of rows' generators, or new ones where there are seeds."""
    return [
        copy.deepcopy(own) if one is None else seeding.np_random(one)[0]
        for own, one in zip(generators, seeds, strict=True)
    ]
