"""Looking at a learned world, and acting in it by hand."""

import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from sfv_world.envs.world_env import WorldEnv

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)

pytestmark = pytest.mark.parametrize("tiny_folder", ["frame-parallel"], indirect=True, ids=[""])


def test_human_windows_follow_the_episode_and_close(tiny_world, windows):
    env = gym.make("sfv_world/World-v0", world=tiny_world, render_mode="human")
    env.reset(seed=0, options={"frames": FRAMES})
    frame = env.step(0)[0]
    assert env.render() is None
    ((name, images),) = windows.items()
    assert tiny_world.name in name and len(images) == 3
    assert np.array_equal(images[0][::8, ::8, ::-1], FRAMES[-1])
    assert images[1].shape == (128, 192, 3) and np.array_equal(images[1][7::8, 7::8, ::-1], frame)
    env.close()
    assert not windows
    env.close()


def test_a_window_closed_by_hand_is_no_error(tiny_world, windows):
    env = WorldEnv(tiny_world, render_mode="human")
    env.reset(seed=0)
    windows.clear()
    env.close()


def test_without_a_display_nothing_is_shown(tiny_world, windows, monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("DISPLAY")
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.warns(UserWarning, match="render_mode: expected a display to show frames on, found none"):
        env = WorldEnv(tiny_world, render_mode="human")
    env.reset(seed=0)
    env.step(0)
    assert env.render() is None and not windows
    env.close()


def test_rendering_without_a_mode_warns(tiny_world):
    env = WorldEnv(tiny_world)
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render_mode: expected 'human' or 'rgb_array', got None"):
        assert env.render() is None


def test_frames_are_rendered_as_observed(tiny_folder: Path):
    env = gym.make("sfv_world/World-v0", world=str(tiny_folder), render_mode="rgb_array", device=torch.device("cpu"))
    frame, _ = env.reset(seed=0)
    assert np.array_equal(env.render(), frame)
    frame = env.step(1)[0]
    assert np.array_equal(env.render(), frame)


def test_it_is_played_by_hand(tiny_world, monkeypatch):
    """By Gymnasium's own `play`: what is pressed is done, until the window is closed."""
    pygame = pytest.importorskip("pygame")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is no matplotlib, which it plots rewards with
        from gymnasium.utils.play import play
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    done = []

    def press(*step):
        done.append(step[2])
        if len(done) == 3:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=ord("d")))
        if len(done) == 6:
            pygame.event.post(pygame.event.Event(pygame.QUIT))

    env = gym.make("sfv_world/World-v0", world=tiny_world, render_mode="rgb_array")
    play(env, keys_to_action={"a": 1, "d": 2}, noop=0, callback=press, zoom=4)
    assert done == [0, 0, 0, 2, 2, 2]
