"""Real environments keep Gymnasium's contract and show square RGB frames that are true to what they were made from."""

from pathlib import Path
from typing import Any

import cv2
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env

from sfv_world.data.images import REPEATED_SCREEN, image_key
from sfv_world.envs.real import LastScreen, make_real

NOOP, ATTACK, RIGHT, LEFT = range(4)  # of doom-basic


class Noise(gym.Env[Any, int]):
    """Shows noise: reward 1 a step, an end after six."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, shape: tuple[int, ...] = (128, 96, 3), key: str = "", render_mode: str | None = None):
        self.image = spaces.Box(0, 255, shape, np.uint8)
        self.key = key
        self.observation_space = spaces.Dict({key: self.image, "health": spaces.Box(0, 1)}) if key else self.image
        self.action_space = spaces.Discrete(2)
        self.render_mode = render_mode

    def _observe(self) -> Any:
        self.shown = self.np_random.integers(0, 256, self.image.shape, np.uint8)
        return {self.key: self.shown, "health": np.ones(1, np.float32)} if self.key else self.shown

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: int) -> Any:
        self.t += 1
        return self._observe(), 1.0, self.t == 6, False, {}

    def render(self) -> np.ndarray:
        return np.zeros((8, 8, 3), np.uint8)


class Blind(Noise):
    """Has neither an image nor a way to render one."""

    metadata = {"render_modes": []}

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 1)


@pytest.fixture(autouse=True)
def registered():
    gym.register("Noise-v0", Noise)
    gym.register("Blind-v0", Blind)
    yield
    del gym.registry["Noise-v0"], gym.registry["Blind-v0"]


def doom(name: str = "doom-basic", **kwargs: Any) -> gym.Env[np.ndarray, Any]:
    pytest.importorskip("vizdoom")
    return make_real(name, **kwargs)


def play(env: gym.Env[np.ndarray, Any], action: int, seed: int) -> list[Any]:
    """An episode of one action: what every reset and step returned."""
    frame, info = env.reset(seed=seed)
    steps = [(frame, 0.0, False, False, info)]
    while not (steps[-1][2] or steps[-1][3]):
        steps.append(env.step(action))
    return steps


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")
@pytest.mark.parametrize("name", ["doom-basic", "doom-takecover", "doom-camera", "CartPole-v1", "Noise-v0"])
def test_contract(name: str) -> None:
    env = doom(name, size=32) if name.startswith("doom") else make_real(name, size=32)
    assert env.observation_space == spaces.Box(0, 255, (32, 32, 3), np.uint8)
    check_env(env, skip_render_check=True)
    env.close()


def test_pixels_are_averages_over_areas() -> None:
    env = make_real("Noise-v0", size=32, frame_skip=1)
    frame, _ = env.reset(seed=0)
    shown = env.unwrapped.shown
    areas = shown.reshape(32, 4, 32, 3, 3).mean(axis=(1, 3))
    assert np.abs(frame - areas).max() <= 1
    assert np.array_equal(frame, cv2.resize(shown, (32, 32), interpolation=cv2.INTER_AREA))


def test_rendering_is_the_observation_where_there_is_no_image() -> None:
    env = make_real("CartPole-v1", size=40, frame_skip=1)
    env.reset(seed=0)
    frame, *_ = env.step(0)
    assert np.array_equal(frame, cv2.resize(env.render(), (40, 40), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize("key", ["", "screen", "image", "pixels"])
@pytest.mark.parametrize("shape", [(64, 48, 3), (64, 48, 1), (64, 48)])
def test_images_are_found_and_become_rgb(key: str, shape: tuple[int, ...]) -> None:
    gym.register("Shaped-v0", Noise, kwargs={"shape": shape, "key": key})
    try:
        env = make_real("Shaped-v0", size=16)
        frame, _ = env.reset(seed=0)
        assert frame in env.observation_space and frame.shape == (16, 16, 3)
        resized = cv2.resize(env.unwrapped.shown, (16, 16), interpolation=cv2.INTER_AREA)
        assert np.array_equal(frame, np.broadcast_to(resized.reshape(16, 16, -1), frame.shape))
    finally:
        del gym.registry["Shaped-v0"]


def test_vectors_and_tiny_boxes_are_no_images() -> None:
    for space in (
        spaces.Discrete(3),
        spaces.Box(0, 255, (64, 64, 3), np.float32),
        spaces.Box(0, 255, (4, 4, 3), np.uint8),
    ):
        assert image_key(space) is None
        assert image_key(spaces.Dict(image=space)) is None


def test_skipped_frames_are_summed() -> None:
    env = make_real("Noise-v0", size=8, frame_skip=4)
    env.reset(seed=0)
    assert [env.step(0)[1:4] for _ in range(2)] == [(4.0, False, False), (2.0, True, False)]


def test_doom_repeats_its_last_screen() -> None:
    env = doom()
    timeout = play(env, NOOP, seed=0)
    kill = next(steps for seed in range(20) if (steps := play(env, ATTACK, seed))[-1][2])
    env.close()
    for steps in (timeout, kill):
        frames = [step[0] for step in steps]
        assert np.array_equal(frames[-1], frames[-2]) and frames[-1].std() > 5
        assert [step[4][REPEATED_SCREEN] for step in steps] == [False] * (len(steps) - 1) + [True]
    assert len(timeout) == 76 and timeout[-1][2:4] == (False, True), "300 tics at 4 a step, and out of time is not over"
    assert kill[-1][2:4] == (True, False) and sum(step[1] for step in kill) > 50


def test_doom_is_doom_under_its_packages_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vizdoom")
    monkeypatch.chdir(tmp_path)
    env = make_real("vizdoom.gymnasium_wrapper:VizdoomBasic-v1", size=16)
    assert isinstance(env, LastScreen)
    env.reset(seed=0)
    env.close()
    assert not (tmp_path / "_vizdoom.ini").exists()  # the game's settings are kept nowhere


def test_doom_moves_against_the_world() -> None:
    """Strafing right moves the picture left, beginning with the very frame that the action leads to."""
    env = doom()
    shown = {action: [step[0] for step in play(env, action, seed=0)] for action in (LEFT, RIGHT)}
    env.close()
    assert np.array_equal(shown[LEFT][0], shown[RIGHT][0]) and not np.array_equal(shown[LEFT][1], shown[RIGHT][1])
    assert shift(shown[LEFT][0], shown[LEFT][3]) > 0 > shift(shown[RIGHT][0], shown[RIGHT][3])


def test_a_camera_goes_where_it_is_told() -> None:
    """A turn, a step ahead and one aside, each from -1 to 1; it stands still at 0, and turns back to where it was (to a pixel)."""
    env = doom("doom-camera")
    assert env.action_space == spaces.Box(-1, 1, (3,))
    still, right, back, ahead, aside = ([0, 0, 0], [0.5, 0, 0], [-0.5, 0, 0], [0, 1, 0], [0, 0, 1])

    def look(*moves: list[float]) -> list[np.ndarray]:
        frames = [env.reset(seed=0)[0]]
        waited = [still] * 3  # the first steps of a game ignore turns
        return [*frames, *(env.step(np.array(move, np.float32))[0] for move in waited + list(moves))][3:]

    turned = look(right, right, back, back)
    assert shift(turned[0], turned[1]) < 0 < shift(turned[2], turned[3])
    assert np.abs(turned[0].astype(int) - turned[4]).mean() < 2 < np.abs(turned[0].astype(int) - turned[2]).mean() / 3
    before, *_, after = look(*[aside] * 6)
    assert shift(before, after) < 0
    near, far = look(*[ahead] * 20)[-1], turned[0]  # at the wall, which hides the floor and the ceiling
    assert abs(near[:20].mean() - near[50:].mean()) < 10 < abs(far[:20].mean() - far[50:].mean())
    env.close()


def shift(before: np.ndarray, after: np.ndarray) -> int:
    """By how many pixels a picture moved to the right."""
    before, after = (frame[8:40].mean(-1) for frame in (before, after))
    return min(range(-8, 9), key=lambda s: float(np.abs(before[:, 8:56] - after[:, 8 + s : 56 + s]).mean()))


def test_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="doom-basic.*Nowhere-v0.*Install the package"):
        make_real("Nowhere-v0")
    with pytest.raises(ValueError, match="nopackage.*Install the package"):
        make_real("nopackage:Nowhere-v0")
    with pytest.raises(ValueError, match="doom basic.*Malformed"):
        make_real("doom basic")
    with pytest.raises(ValueError, match="env_id: expected one of .* got 'a:b:c'"):
        make_real("a:b:c")
    with pytest.raises(ValueError, match="Blind-v0.*Box.*Wrap it"):
        make_real("Blind-v0")
    with pytest.raises(ValueError, match="render_mode.*rgb_array.*human"):
        make_real("CartPole-v1", render_mode="human")
    with pytest.raises(ValueError, match="size: expected at least 8, got 7"):
        make_real("CartPole-v1", size=7)
    with pytest.raises(
        ValueError, match="env_id: expected .* got 'sfv_world/World-v0' .*'world'.*needs arguments with them"
    ):
        make_real("sfv_world/World-v0")
    monkeypatch.setitem(__import__("sys").modules, "pygame", None)
    with pytest.raises(ValueError, match="env_id: expected .* rendered here, got 'CartPole-v1'.*pygame.*pip install"):
        make_real("CartPole-v1")
    monkeypatch.setitem(__import__("sys").modules, "vizdoom.gymnasium_wrapper", None)
    with pytest.raises(ValueError, match=r"vizdoom.*pip install -e \"\.\[doom\]\""):
        make_real("doom-basic")
