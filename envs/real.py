"""Real environments as square RGB frames: where data comes from, and where agents are finally judged.

Everything downstream (collection, training, agents) sees one kind of observation: (size, size, 3) uint8 frames. This
module turns an environment into that with Gymnasium's own wrappers; only Doom needs one of ours, because its game has
no screen left once an episode is over.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import (
    AddRenderObservation,
    RepeatAction,
    ResizeObservation,
    TransformAction,
    TransformObservation,
)

from sfv_world.data.images import REPEATED_SCREEN, SMALLEST, image_key


@dataclass(frozen=True)
class Recipe:
    """What a short name stands for: a registered environment, its keyword arguments and, of a free camera, its moves."""

    env_id: str
    """Gymnasium id."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of `gymnasium.make`."""
    moves: dict[str, float] = field(default_factory=dict)
    """Delta buttons of a Doom game, each with the value of a full move. The actions are then a Box of [-1, 1] each."""


RECIPES = {
    "doom-basic": Recipe("VizdoomBasic-v1"),
    "doom-takecover": Recipe("VizdoomTakeCover-v1"),
    "doom-camera": Recipe(
        "VizdoomBasic-v1",
        {"render_weapon": False, "episode_timeout": 1200},
        # A game step turns by 2 degrees, and moves by 5 map units ahead and 4 aside once at full speed, about ten frames on.
        {"TURN_LEFT_RIGHT_DELTA": 2.0, "MOVE_FORWARD_BACKWARD_DELTA": 16.0, "MOVE_LEFT_RIGHT_DELTA": 12.0},
    ),
}


class LastScreen(gym.Wrapper[np.ndarray, Any, np.ndarray, Any], gym.utils.RecordConstructorArgs):
    """Shows a Doom game's last real screen again where the game has none.

    ViZDoom has no state after an episode's last action and returns a black screen there. This wrapper returns the
    screen before it once more and says so in `info["repeated_screen"]`, so that a model is never asked to predict a
    black frame that no game ever showed. ViZDoom also reports a timeout as both terminated and truncated; here it is
    truncated only.
    """

    def __init__(self, env: gym.Env[np.ndarray, Any]):
        gym.utils.RecordConstructorArgs.__init__(self)
        gym.Wrapper.__init__(self, env)
        self._screen: np.ndarray | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        self._screen, info = self.env.reset(seed=seed, options=options)
        return self._screen.copy(), {**info, REPEATED_SCREEN: False}

    def step(self, action: Any) -> tuple[np.ndarray, SupportsFloat, bool, bool, dict[str, Any]]:
        screen, reward, terminated, truncated, info = self.env.step(action)
        repeated = self.unwrapped.state is None  # type: ignore[attr-defined]
        if not repeated:
            self._screen = screen
        assert self._screen is not None, "step comes after reset"
        terminated = bool(terminated and not truncated)
        return self._screen.copy(), reward, terminated, bool(truncated), {**info, REPEATED_SCREEN: repeated}


def make_real(
    env_id: str,
    *,
    size: int = 64,
    frame_skip: int = 4,
    render_mode: str | None = None,
) -> gym.Env[np.ndarray, Any]:
    """Makes a real environment whose observations are (size, size, 3) uint8 frames.

    The image is the observation itself, or its entry "screen", "image" or "pixels"; an environment without one is
    rendered (`rgb_array`). Gray images become RGB, and every image is resized by area (`cv2.INTER_AREA`), whatever its
    aspect.

    At the end of a Doom episode the game has no screen: the last real screen is returned again, marked by
    `info["repeated_screen"]`. See `LastScreen`.

    Args:
        env_id: a recipe ("doom-basic", "doom-takecover", or "doom-camera": a free camera in the room of Basic) or the
            id of any installed Gymnasium environment; ids of packages that must be imported first are written
            "package:Id-v0".
        size: height and width of the frames, in pixels.
        frame_skip: game steps each action is held for; their rewards are summed. Doom runs at 35 steps a second.
        render_mode: render mode of the environment; one that has no image observation only takes "rgb_array".

    Raises:
        ValueError: if the environment is unknown, its package is not installed, or it can give no image.

    Example:
        >>> env = make_real("CartPole-v1", size=32, frame_skip=1)
        >>> frame, info = env.reset(seed=0)
        >>> frame.shape, frame.dtype
        ((32, 32, 3), dtype('uint8'))
    """
    for name, value, least in (("size", size, SMALLEST), ("frame_skip", frame_skip, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}.")
    recipe = RECIPES.get(env_id, Recipe(env_id))
    doom = recipe.env_id.rpartition(":")[2].startswith("Vizdoom")
    rendering = {} if render_mode is None else {"render_mode": render_mode}  # not every environment knows the argument
    if doom:
        _register_doom(env_id)
        # No settings file: a game looks the same wherever it is started, and leaves none behind.
        env = _make(env_id, _with_buttons(recipe), frame_skip=frame_skip, doom_config_path=os.devnull, **rendering)
        if recipe.moves:
            full = np.array([*recipe.moves.values()], np.float32)
            env = TransformAction(env, lambda action: action * full, spaces.Box(-1, 1, full.shape))
    else:
        env = _make(env_id, recipe, **rendering)
        if image_key(env.observation_space) is None:
            env.close()
            if render_mode not in (None, "rgb_array"):
                raise ValueError(
                    f"render_mode of {env_id!r}: expected 'rgb_array', as frames are rendered, got {render_mode!r}."
                )
            env = _rendered(env_id, recipe)
        if frame_skip > 1:
            env = RepeatAction(env, frame_skip)
        if image_key(env.observation_space) is None:
            env = _showing(env_id, env)
    env = ResizeObservation(_image(env), (size, size))
    if env.observation_space.shape != (size, size, 3):
        rgb = spaces.Box(0, 255, (size, size, 3), np.uint8)
        env = TransformObservation(env, lambda gray: gray.reshape(size, size, 1).repeat(3, axis=2), rgb)
    return LastScreen(env) if doom else env


def _image(env: gym.Env[Any, Any]) -> gym.Env[np.ndarray, Any]:
    """Reduces the observation to its image."""
    key = image_key(env.observation_space)
    if not key:
        return env
    assert isinstance(env.observation_space, spaces.Dict)
    return TransformObservation(env, lambda observation: observation[key], env.observation_space[key])


def _make(env_id: str, recipe: Recipe, **kwargs: Any) -> gym.Env[Any, Any]:
    try:
        return gym.make(recipe.env_id, **recipe.kwargs, **kwargs)
    except (gym.error.Error, ModuleNotFoundError, ValueError, TypeError) as error:
        raise ValueError(
            f"env_id: expected one of {', '.join(RECIPES)} or the id of an installed Gymnasium environment, "
            f"got {env_id!r} ({error}). Install the package that has it, write 'package:Id-v0' if it does not register itself, "
            "and register one that needs arguments with them."
        ) from error


def _rendered(env_id: str, recipe: Recipe) -> gym.Env[Any, Any]:
    env = _make(env_id, recipe)
    modes = env.metadata.get("render_modes") or []
    if "rgb_array" not in modes:
        raise ValueError(
            "env_id: expected an environment with a uint8 image observation or the render mode 'rgb_array', "
            f"got {env_id!r} with observation space {env.observation_space} and render modes {list(modes)}. "
            "Wrap it so that it has an image."
        )
    env.close()
    return _make(env_id, recipe, render_mode="rgb_array")


def _showing(env_id: str, env: gym.Env[Any, Any]) -> gym.Env[np.ndarray, Any]:
    """Makes what is rendered the observation; some find out only now that they lack the package to render with."""
    try:
        return AddRenderObservation(env)
    except gym.error.Error as error:
        raise ValueError(
            f"env_id: expected an environment that can be rendered here, got {env_id!r} ({error}). Install what it needs."
        ) from error


def _with_buttons(recipe: Recipe) -> Recipe:
    """The same with its moves as the game's buttons."""
    if not recipe.moves:
        return recipe
    import vizdoom

    buttons = [getattr(vizdoom.Button, name) for name in recipe.moves]
    return replace(recipe, kwargs={**recipe.kwargs, "available_buttons": buttons})


def _register_doom(env_id: str) -> None:
    try:
        import vizdoom.gymnasium_wrapper  # noqa: F401  (importing registers the ids)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"env_id {env_id!r}: expected the package vizdoom, which is not installed. "
            'Run `pip install -e ".[doom]"` in a clone of this project.'
        ) from error
