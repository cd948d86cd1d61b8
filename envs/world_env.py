"""A learned world as a Gymnasium environment: one row of a `World`, frame by frame.

`reset` reads observed frames, `step` imagines the next one and says how likely it was.
"""

import copy
import os
import sys
import warnings
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
from jaxtyping import Float, UInt8
from torch import Tensor

from sfv_world.control.spaces import flatten_actions, map_actions
from sfv_world.given import given_frames
from sfv_world.loading import load_world
from sfv_world.state import WorldOutput, WorldState
from sfv_world.transfer import Fetch
from sfv_world.world import World

ENLARGED = 8
"""Side of a pixel in the window of render mode "human"."""


@dataclass(frozen=True)
class EnvState:
    """Where an environment stands: what `WorldEnv.save_state` gives and `WorldEnv.restore_state` takes."""

    row: WorldState
    """The world's state."""
    terminated: bool
    """Whether the episode has ended."""


class WorldEnv(gym.Env[np.ndarray, Any]):
    """A learned world behind the Gymnasium API: `gymnasium.make("sfv_world/World-v0", world=...)`.

    **Observations** are frames, (H, W, 3) uint8. The first one after `reset` is the last observed frame, all others
    are imagined. A world whose codec compresses time (one on a released model) goes on by T frames a step: its observations are
    (T, H, W, 3), as `observation_space` says, an action is held for all of them, rewards are their sum, and `max_episode_steps`
    counts steps. After `reset` they are the last T observed frames, the first one repeated where there are fewer.
    **Actions** are those of the environment that the world learned from. The **reward** is the
    expected one, given whether the episode ends with the frame. **Termination** is drawn with its predicted
    probability. There is no truncation but that of `max_episode_steps`.

    `step` has in its `info`:

    - `log_likelihood`: log p(frame | all before it, actions), in nats, of the noised pixels in [-1, 1] or latents; in a world
      on a released model, given its prompt and the frames of its chunk (`released.adapted`)
    - `bits_per_dim`: the same in bits per colour value or, in a latent world, per latent, negated
    - `sweeps`: passes of the deep flow that decoding took
    - `certificate`: max|z' - z| between the frame's exact noise and the noise asked for
    - `guided`: whether `guidance` moved the frame, whose likelihood is that of the unguided model all the same
    - `termination_probability`: of ending with this frame
    - `frames_behind`: 1 with `denoise="lookahead"`, else 0

    `denoise="causal"` shows clean frames, `denoise="lookahead"` cleaner ones: cleaning one takes the next, so frame, reward,
    termination and info of a step are those of the frame before. The first step repeats the last observed frame, without
    a reward, and the end of an episode comes one step after its last action, whatever the action is then. Likelihoods
    are those of the noised frames, which the world goes on from.

    An episode is a function of its seed, its observed frames and its actions.

    Args:
        world: the name of a shipped world, a world's folder, or a `World`.
        device: where to load the world, by default the CPU; a `World` stays where it is.
        dtype: what its Transformers compute in (see `load_world`); a `World` stays as it is.
        render_mode: "rgb_array" returns the frame, "human" shows it in a window after every reset and step, if there is a display.
        decoding: fields of `DecodingConfig` (tolerance, block, max_sweeps, draft, temperature, guidance, denoise) to set; block,
            max_sweeps and draft change nothing where no sweeps are needed (`World.direct`), as in the shipped worlds.

    Raises:
        ValueError: if there is no such world or an argument is out of range.

    Example:
        >>> import gymnasium as gym, sfv_world
        >>> env = gym.make("sfv_world/World-v0", world="doom-basic", max_episode_steps=100)  # doctest: +SKIP
        >>> frame, info = env.reset(seed=0)  # doctest: +SKIP
        >>> frame, reward, terminated, truncated, info = env.step(env.action_space.sample())  # doctest: +SKIP
    """

    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(
        self,
        world: World | str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        render_mode: str | None = None,
        **decoding: Any,
    ):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"render_mode: expected None, 'human' or 'rgb_array', got {render_mode!r}.")
        self.world, fps = open_world(world, device, dtype, decoding)
        self.render_mode = render_mode
        if render_mode == "human" and not _has_display():
            gym.logger.warn("render_mode: expected a display to show frames on, found none: they are not shown.")
        self.metadata = {**self.metadata, "render_fps": fps}
        self.observation_space = spaces.Box(0, 255, self.world.observation_shape, np.uint8)
        self.action_space = copy.deepcopy(self.world.action_space)
        self._state: WorldState | None = None
        self._terminated = False
        self._window: str | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[UInt8[np.ndarray, "*time h w 3"], dict[str, Any]]:
        """Begins an episode at observed frames.

        Args:
            seed: seeds `np_random`, which decides the episode's randomness and, without options, where it starts.
            options: "frames", (K, H, W, 3) uint8, K being 1 + a multiple of the frames of a step, and "actions", the K-1 actions
                between them: an array with the actions in its first dimension, for Dict and Tuple spaces a dict or tuple of
                such; frames alone if the actions are not known. With "noised": True they are imagined frames, which have the
                world's noise already (see `World.reset`). By default, the episode starts at one of the start frames that came
                with the world.

        Returns:
            The last observed frame and an empty info.

        Raises:
            ValueError: if an option is unknown, missing, or not as the world expects; nothing has changed then.
        """
        observed, noised = self._observed(options or {}), bool((options or {}).get("noised", False))
        before = copy.deepcopy(self._np_random), self._np_random_seed
        super().reset(seed=seed)
        row_seed = [self.np_random.integers(2**63)]
        try:
            begin = self.world.start if observed is None else partial(self.world.reset, *observed, noised=noised)
            self._state = begin(row_seed)
        except ValueError:
            self._np_random, self._np_random_seed = before
            raise
        self._terminated = False
        self._show()
        return self._frame("reset"), {}

    def step(self, action: Any) -> tuple[UInt8[np.ndarray, "*time h w 3"], float, bool, bool, dict[str, Any]]:
        """Imagines the next frame, or the frames of the next step where it has several.

        Raises:
            ResetNeeded: if no episode has begun or it has ended.
            ValueError: if the action is not of the action space; nothing has changed then.
        """
        state = self._current("step")
        if self._terminated:
            raise ResetNeeded("step: expected an episode that goes on, got one that has ended. Call reset() first.")
        flatten_actions(self.action_space, action, (), "action")  # says what is wrong with it as it was given
        try:
            self._state, output = self.world.step(state, _one(self.action_space, action))
        except BaseException:
            self._state = None if state.spent else state  # interrupted halfway, the episode is lost
            raise
        told = step_info(output)
        fetch = Fetch(
            [self._state.frames, output.reward.double(), output.terminated, output.certificate, *told.values()]
        )
        (frame,), (reward,), (terminated,), certificates, *values = fetch.wait()
        self._terminated = bool(terminated)
        warn_if_unconverged(certificates, self.world, stacklevel=3)
        info = {name: value.item() for name, value in zip(told, values, strict=True)}
        self._show()
        return frame, float(reward), self._terminated, False, info

    def render(self) -> UInt8[np.ndarray, "h w 3"] | None:
        """The current frame, the last of a step, in render mode "rgb_array"; in "human" it is shown in a window instead."""
        if self.render_mode is None:
            gym.logger.warn("render_mode: expected 'human' or 'rgb_array', got None. Give one to gymnasium.make.")
            return None
        frame = self._frame("render").reshape(-1, *self.world.frame_shape)[-1]
        if self.render_mode == "rgb_array":
            return frame
        if not _has_display():
            return None
        import cv2

        self._window = f"sfv_world: {self.world.name}"
        cv2.imshow(self._window, frame.repeat(ENLARGED, axis=0).repeat(ENLARGED, axis=1)[..., ::-1])
        cv2.waitKey(1)
        return None

    def close(self) -> None:
        """Closes the window, if there is one."""
        if self._window is not None:
            import cv2

            if cv2.getWindowProperty(self._window, cv2.WND_PROP_VISIBLE) > 0:
                cv2.destroyWindow(self._window)
            self._window = None

    def save_state(self) -> EnvState:
        """Where the episode stands, as a value: a copy that later steps do not change. (Behind wrappers: `env.unwrapped`.)

        Raises:
            ResetNeeded: if no episode has begun.
        """
        return EnvState(self._current("save_state")[:], self._terminated)

    def restore_state(self, state: Any, seed: int | None = None) -> None:
        """Continues from a saved state, bit for bit as the first time if the actions are the same; or by other chance.

        It may be restored any number of times, and in any environment of the same world: behind Gymnasium's wrappers, which
        count steps and refuse them before a `reset`, reset that one first. `np_random`, which seeds later episodes, goes on as
        it is, and so do wrappers: `max_episode_steps` counts steps, not frames.

        Args:
            state: what `save_state` gave; it can be pickled.
            seed: of another future; none: what is drawn is what was drawn the first time.

        Raises:
            ValueError: if the state is none, or another world's; nothing has changed then.
        """
        if not isinstance(state, EnvState):
            raise ValueError(f"state: expected what save_state returned, got {type(state).__name__}.")
        self.world.check_state(state.row)
        row = state.row[:] if seed is None else state.row.reseeded([seeding.np_random(seed)[0].integers(2**63)])
        self._state, self._terminated = row, state.terminated

    def _current(self, name: str) -> WorldState:
        if self._state is None:
            raise ResetNeeded(f"{name}: expected an episode that has begun, got none. Call reset() first.")
        return self._state

    def _frame(self, name: str) -> np.ndarray:
        return self._current(name).frames[0].cpu().numpy().copy()

    def _show(self) -> None:
        """Shows a person the current frame."""
        if self.render_mode == "human":
            self.render()

    def _observed(self, options: dict[str, Any]) -> tuple[Any, Any] | None:
        """Frames and actions of one row, batched for `World.reset`; None if none are given."""
        if not options:
            return None
        if "frames" not in options or options.keys() - {"frames", "actions", "noised"}:
            raise ValueError(
                f"options: expected 'frames' with 'actions' and 'noised', or none of them, got {list(options)}. Give K observed "
                "frames and the K-1 actions between them, or nothing to begin at a start frame of the world."
            )
        frames = given_frames(options["frames"], "(K", self.world.frame_shape, self.world.device)[None]
        actions = options.get("actions")
        if actions is None or (frames.shape[1] == 1 and np.ndim(actions) > 0 and len(actions) == 0):
            return frames, None
        flatten_actions(self.action_space, actions, (frames.shape[1] - 1,))  # as it does that of a step
        return frames, _one(self.action_space, actions)


def _has_display() -> bool:
    """Whether windows can be opened; where they cannot, OpenCV would end the process."""
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def open_world(
    world: World | str | Path,
    device: str | torch.device | None,
    dtype: torch.dtype | None,
    decoding: dict[str, Any],
) -> tuple[World, int]:
    """The world an environment steps, decoding as asked for, and its steps a second, rounded: Gymnasium's tools want it whole.

    Raises:
        ValueError: if there is no such world, or one that is loaded is on another device or was given a dtype.
    """
    if not isinstance(world, World):
        world = load_world(world, device or "cpu", dtype=dtype)
    elif dtype is not None:
        raise ValueError(f"dtype: expected None for a world that is loaded, got {dtype}. Give it to load_world.")
    elif device is not None and str(device) not in _names(world.device):
        raise ValueError(f"device: expected {world.device}, where the world is, got {device}. Load it there.")
    return world.with_decoding(**decoding), max(1, round(world.fps / world.time))


def _names(device: torch.device) -> tuple[str, str]:
    """What a device may be called: its type alone, too; the CPU is the first of its type."""
    return device.type, f"{device.type}:{device.index or 0}"


def step_info(output: WorldOutput) -> dict[str, Tensor]:
    """What `info` says of a step, by row."""
    return {
        "log_likelihood": output.log_likelihood.double(),
        "bits_per_dim": output.bits_per_dim.double(),
        "sweeps": output.sweeps,
        "certificate": output.certificate.double(),
        "guided": output.guided,
        "frames_behind": output.frames_behind,
        "termination_probability": output.termination_probability.double(),
    }


def warn_if_unconverged(certificates: Float[np.ndarray, "b"], world: World, stacklevel: int) -> None:
    """Warns of frames whose decoding stopped before they were what was asked for; never silently."""
    worst, tolerance = certificates.max(), world.decoding.tolerance  # NaN, if there is one
    if worst <= tolerance:
        return
    if np.isfinite(worst):
        said = "The frame's log-likelihood is exact, but it is not quite a sample: "
        if world.direct:
            said += "what is left is rounding. Raise the tolerance, or lower the temperature."
        else:
            said += "decoding stopped before it converged. Raise max_sweeps."
    else:
        said = "The frame is not finite, and nothing that is said of it holds. Lower the temperature, or guide less."
    warnings.warn(
        f"certificate: expected at most {tolerance:g}, got {worst:.3g}. {said}", RuntimeWarning, stacklevel=stacklevel
    )


def _one(space: spaces.Space[Any], actions: Any) -> Any:
    """Actions of one row as those of a batch: a leading dimension of 1 for every array of the tree."""
    return map_actions(lambda array: array[None], space, actions)
