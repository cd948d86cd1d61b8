"""A recording of made-up episodes, a world that says it was trained on it, and whether two recordings are the same."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from sfv_world.checkpoint import CONFIG
from sfv_world.data.clips import Episodes

LENGTHS = (14, 17, 12, 20, 13, 16, 15, 18)


def record(folder: Path, action_space: spaces.Space, lengths: tuple[int, ...] = LENGTHS, height: int = 16) -> Path:
    """Episodes of so many frames of `height` x 24 pixels, in which a bright square wanders over a grey ground."""
    rng = np.random.default_rng(0)
    storage = MinariStorage.new(
        folder, spaces.Box(0, 255, (height, 24, 3), np.uint8), action_space, data_format="hdf5", jpeg_encoding=False
    )
    action_space.seed(0)
    for length in lengths:
        frames = np.full((length, height, 24, 3), rng.integers([81, 101, 121], [100, 120, 140]), np.uint8)
        for n, frame in enumerate(frames):
            frame[4:10, n % 18 : n % 18 + 6] = 250
        ends = np.arange(1, length) == length - 1
        actions = np.array([action_space.sample() for _ in range(length - 1)])
        storage.update_episodes(
            [
                EpisodeBuffer(
                    observations=frames,
                    actions=actions,
                    rewards=np.zeros(length - 1),
                    terminations=ends,
                    truncations=np.zeros(length - 1, bool),
                )
            ]
        )
    return folder


def trained(world: Path, folder: Path, held_out: float = 0.5) -> Path:
    """A copy of a world whose configuration says how a recording was split to train it."""
    shutil.copytree(world, folder)
    return said(folder, training={"held_out": held_out, "seed": 0})


def said(folder: Path, **about: Any) -> Path:
    """A world or codec, now that its configuration says this about it."""
    config = json.loads((folder / CONFIG).read_text())
    config["about"] |= about
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def assert_same(a: Episodes, b: Episodes) -> None:
    """Raises an AssertionError unless both are the same recording."""
    for name in ("frames", "actions", "rewards", "terminations", "repeated", "starts"):
        np.testing.assert_equal(getattr(a, name), getattr(b, name), err_msg=name)
