"""Recordings survive being killed, continue as if never interrupted, and come back aligned and whole."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from recorded import assert_same, record

from sfv_world.data import collect as collecting
from sfv_world.data.clips import Clips, ClipSampler, load_episodes
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.envs.real import make_real
from sfv_world.given import alone_in

ACTION_SPACES = {
    "Discrete": spaces.Discrete(5),
    "Box": spaces.Box(-1, 1, (2,)),
    "MultiBinary": spaces.MultiBinary(3),
    "Tree": spaces.Dict(
        keys=spaces.MultiDiscrete([3, 4]), mouse=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3)))
    ),
}


def fingerprint(action: Any) -> int:
    """A number in 0 to 255 that tells actions apart."""
    if isinstance(action, dict):
        return sum(fingerprint(part) for part in action.values()) % 256
    if isinstance(action, tuple):
        return sum(fingerprint(part) for part in action) % 256
    return int(np.abs(np.asarray(action, np.float64) * [[37, 11, 5][: np.size(action)]]).sum()) % 256


class Counter(gym.Env[np.ndarray, Any]):
    """Shows what happened: rows of the frame hold the time, the last action's fingerprint, and the episode's number."""

    def __init__(self, actions: str = "Discrete"):
        self.observation_space = spaces.Box(0, 255, (8, 8, 3), np.uint8)
        self.action_space = ACTION_SPACES[actions]

    def _observe(self, action: int) -> np.ndarray:
        frame = np.zeros((8, 8, 3), np.uint8)
        frame[0], frame[1], frame[2:] = self.t, action, self.number
        return frame

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t, self.number, self.length = 0, int(self.np_random.integers(256)), int(self.np_random.integers(1, 12))
        return self._observe(0), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        mark = fingerprint(action)
        over = self.t == self.length
        return (
            self._observe(mark),
            self.t + mark / 1000,
            over and self.length % 2 == 0,
            over and self.length % 2 == 1,
            {},
        )


@pytest.fixture(autouse=True, scope="module")
def registered():
    for name in ACTION_SPACES:
        gym.register(f"Counter{name}-v0", Counter, kwargs={"actions": name})
    yield
    for name in ACTION_SPACES:
        del gym.registry[f"Counter{name}-v0"]


def config(out: Path, **changes: Any) -> CollectConfig:
    small = CollectConfig(env="CounterDiscrete-v0", out=out, frames=150, size=8, frame_skip=1, frames_per_write=40)
    return replace(small, **changes)


def rows_of(actions: Any, rows: Any) -> Any:
    if isinstance(actions, dict):
        return {key: rows_of(value, rows) for key, value in actions.items()}
    if isinstance(actions, tuple):
        return tuple(rows_of(value, rows) for value in actions)
    return actions[rows]


# Recording


@pytest.mark.parametrize("actions", ACTION_SPACES)
def test_everything_is_aligned_to_its_frame(tmp_path: Path, actions: str) -> None:
    path = collect(config(tmp_path / "d", env=f"Counter{actions}-v0"))
    data = load_episodes(path)
    assert len(data.frames) >= 150 and data.lengths.sum() == len(data.frames)
    assert len(set(data.lengths)) > 3 and data.terminations.any(), "a telling recording"
    for start, end in zip(data.starts, data.ends, strict=True):
        marks = [fingerprint(rows_of(data.actions, row)) for row in range(start, end)]
        assert data.frames[start:end, 0, 0, 0].tolist() == list(range(end - start))
        assert data.frames[start:end, 1, 0, 0].tolist() == [0, *marks[:-1]], "a frame shows the action before it"
        np.testing.assert_allclose(
            data.rewards[start:end], [0] + [t + mark / 1000 for t, mark in enumerate(marks[:-1], 1)]
        )
        assert marks[-1] == 0, "no action is taken at the last frame"
        even = (end - start - 1) % 2 == 0
        assert data.terminations[start:end].tolist() == [False] * (end - start - 1) + [even]


def test_minari_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = collect(config(tmp_path / "counter"))
    shutil.copytree(path, tmp_path / "root" / "sfv-world" / "counter-v0" / "data")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "root"))
    data = load_episodes(path)
    for dataset in (minari.MinariDataset(path), minari.load_dataset("sfv-world/counter-v0")):
        assert dataset.total_episodes == len(data) and dataset.total_steps == len(data.frames) - len(data)
        for k, episode in enumerate(dataset):
            assert episode.id == k
            assert np.array_equal(episode.observations, data.frames[data.starts[k] : data.ends[k]])
        assert dataset.action_space == data.action_space == spaces.Discrete(5)
        assert next(iter(dataset.storage.get_episode_metadata([1])))["id"] == 1
    metadata = json.loads((path / "metadata.json").read_text())
    assert metadata["recipe"] == data.metadata["recipe"] == {
        "env": "CounterDiscrete-v0", "size": 8, "frame_skip": 1, "policy": "random", "hold": [1, 8], "seed": 0,
        "max_episode_steps": None, "version": collecting.RECIPE_VERSION,
    }  # fmt: skip


def test_minari_recovers_the_environment(tmp_path: Path) -> None:
    path = collect(config(tmp_path / "d", env="CartPole-v1", size=16, frame_skip=2, frames=10))
    env = minari.MinariDataset(path).recover_environment()
    assert env.observation_space == spaces.Box(0, 255, (16, 16, 3), np.uint8)
    metadata = next(iter(MinariStorage.read(path).get_episode_metadata([0])))
    assert np.array_equal(env.reset(seed=metadata["seed"])[0], load_episodes(path).frames[0])
    assert load_episodes(path).fps == 25, "50 a second, two steps a frame"


def test_continuing_is_the_same_as_not_stopping(tmp_path: Path) -> None:
    for frames in (1, 60, 60, 150):
        collect(config(tmp_path / "stopped", frames=frames))
    collect(config(tmp_path / "straight"))
    assert_same(load_episodes(tmp_path / "stopped"), load_episodes(tmp_path / "straight"))


def test_complete_recording_is_left_alone(tmp_path: Path) -> None:
    path = collect(config(tmp_path / "d"))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    collect(config(path))
    assert before == {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def test_seed_changes_the_recording(tmp_path: Path) -> None:
    a, b = (load_episodes(collect(config(tmp_path / str(seed), seed=seed))) for seed in (0, 1))
    assert not np.array_equal(a.frames[:100], b.frames[:100])


def test_episodes_can_be_truncated(tmp_path: Path) -> None:
    data = load_episodes(collect(config(tmp_path / "d", max_episode_steps=4)))
    assert data.lengths.max() == 5
    assert not data.terminations[data.ends - 1][data.lengths == 5].all()


class Killed(Exception):
    pass


@pytest.mark.parametrize("begun", [None, 20])
def test_stopping_before_any_file_operation_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: int | None
) -> None:
    """Stops the same write before its first file operation, before its second, and so on; each time continues."""
    straight = load_episodes(collect(config(tmp_path / "straight", frames=35)))
    out, base = tmp_path / "stopped" / "d", tmp_path / "base"
    out.parent.mkdir()
    if begun is not None:
        collect(config(base, frames=begun))
    left = 0

    def counted(function: Any) -> Any:
        def operation(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                raise Killed
            left -= 1
            return function(*args, **kwargs)

        return operation

    operations = [
        (Path, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "write_text"), (Path, "touch"), (shutil, "copy"),
        (shutil, "rmtree"), (h5py.Group, "create_dataset"), (h5py.Group, "__setitem__"), (h5py.Group, "__delitem__"),
    ]  # fmt: skip
    for allowed in range(1000):
        if begun is not None:
            shutil.copytree(base, out)
        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, counted(getattr(owner, name)))
            left = allowed
            try:
                collect(config(out, frames=35))
                break
            except Killed:
                pass
        if begun is not None or out.exists():
            dataset = minari.MinariDataset(out)
            assert len(dataset) == len(list(dataset)) >= (len(load_episodes(base)) if begun else 0)
        assert_same(load_episodes(collect(config(out, frames=35))), straight)
        assert [file.name for file in out.parent.rglob(".*")] == [], "nothing is left behind"
        shutil.rmtree(out)
    assert allowed > 20


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CollectConfig(env="CartPole-v1", out=tmp_path / "d", frames=30, size=16, frame_skip=1)
    collect(config)
    before = {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}
    monkeypatch.setattr(collecting.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"d: expected room for \d+ MB, found 0 MB free"):
        collect(replace(config, frames=100))
    assert before == {path: path.read_bytes() for path in config.out.rglob("*") if path.is_file()}


def test_ctrl_c_keeps_whole_episodes(
    ctrl_c: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CollectConfig(env="CartPole-v1", out=tmp_path / "d", frames=100, size=16, frame_skip=1)
    play, played = collecting.record_episode, 0

    def interrupted(*arguments: Any) -> EpisodeBuffer | None:
        nonlocal played
        played += 1
        if played == 3:
            ctrl_c()
        return play(*arguments)

    monkeypatch.setattr(collecting, "record_episode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collect(config)
    assert MinariStorage.read_raw_metadata(config.out)["total_episodes"] == 2  # the third was played for a step
    collect(config)
    whole = collect(replace(config, out=tmp_path / "whole"))
    np.testing.assert_array_equal(load_episodes(config.out).frames, load_episodes(whole).frames)


def test_ctrl_c_ends_an_episode_that_does_not_end(
    ctrl_c: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, steps = tmp_path / "d", 0

    class Endless(gym.Wrapper[Any, Any, Any, Any]):
        def step(self, action: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == 50:
                ctrl_c()
            observation, reward, _, _, info = self.env.step(action)
            return observation, reward, False, False, info

    monkeypatch.setattr(collecting, "make_real", lambda *names, **sizes: Endless(make_real(*names, **sizes)))
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings(action="ignore"):  # CartPole is surprised
        collect(config(out, frames=10))
    assert steps == 50 and MinariStorage.read_raw_metadata(out)["total_episodes"] == 0


def test_killed_recording_is_readable_and_continues(tmp_path: Path) -> None:
    """Kills real recordings while they write all the time."""
    script = (
        "import sys; from pathlib import Path; from sfv_world.data.collect import *; "
        "out = Path(sys.argv[1]); "
        "collect(CollectConfig(env='CartPole-v1', out=out, frames=10**7, size=16, frame_skip=1, frames_per_write=1))"
    )
    out = tmp_path / "d"
    delay = random.Random(0)
    episodes = 0
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(out)], stderr=subprocess.DEVNULL, cwd=Path(__file__).parent.parent
        )
        while not out.exists() or MinariStorage.read_raw_metadata(out)["total_episodes"] < episodes + 3:
            assert process.poll() is None, "the recording ended by itself"
            time.sleep(0.01)
        time.sleep(delay.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        dataset = minari.MinariDataset(out)
        assert len(dataset) >= episodes + 3
        assert all(len(episode.observations) == len(episode) + 1 for episode in dataset)
        episodes = len(dataset)
    killed = load_episodes(out)
    straight = CollectConfig(
        env="CartPole-v1", out=tmp_path / "straight", frames=len(killed.frames), size=16, frame_skip=1
    )
    assert_same(killed, load_episodes(collect(straight)))


def test_doom_is_recorded(tmp_path: Path) -> None:
    pytest.importorskip("vizdoom")
    data = load_episodes(collect(config(tmp_path / "d", env="doom-basic", frames=100, size=32, frame_skip=4)))
    assert data.frames.shape[1:] == (32, 32, 3) and data.fps == 35 / 4
    assert np.flatnonzero(data.repeated).tolist() == (data.ends - 1).tolist()
    assert np.array_equal(data.frames[data.ends - 1], data.frames[data.ends - 2])


def test_recording_says_what_is_wrong(tmp_path: Path) -> None:
    path = collect(config(tmp_path / "d", frames=10))
    with pytest.raises(ValueError, match="another configuration.*seed: expected 0, got 1.*another folder"):
        collect(config(path, seed=1))
    with pytest.raises(ValueError, match="holds other files"):
        collect(config(tmp_path))
    for changes, message in (
        ({"frames_per_write": 0}, "frames_per_write: expected at least 1, got 0"),
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        ({"size": 4}, "size: expected at least 8, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            collect(config(tmp_path / "e", **changes))
    assert not (tmp_path / "e").exists()


def test_one_run_at_a_time_writes_to_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "d"
    with (
        alone_in(path),
        pytest.raises(ValueError, match=r"out: expected a folder that no other run writes to, got .*d, which one does"),
    ):
        collect(config(path, frames=10))
    assert not path.exists()
    assert len(load_episodes(collect(config(path, frames=10)))) >= 1
    with alone_in(path), alone_in(tmp_path):
        assert load_episodes(path).frames.shape[1:] == (8, 8, 3)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda path: (path / "main_data.hdf5").write_bytes(b"cut off"),
            "expected whole episodes, got some that cannot be read .*signature",
        ),
        (lambda path: shutil.rmtree(path / "parts"), "expected whole episodes, got some that cannot be read"),
        (
            lambda path: counted(path, 3),
            "expected .* frames, as its metadata says, got others. Copy or record it again",
        ),
        (lambda path: counted(path, -3), "expected .* frames, as its metadata says, got others"),
        (lambda path: (path / "metadata.json").write_text("{"), "expected the folder of a Minari dataset"),
    ],
)
def test_damage_is_told(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    path = collect(config(tmp_path / "d", frames=30))
    damage(path)
    with pytest.raises(ValueError, match=said):
        load_episodes(path)


def counted(path: Path, more: int) -> None:
    """Has a recording say that it holds so many steps more."""
    metadata = json.loads((path / "metadata.json").read_text())
    metadata["total_steps"] += more
    (path / "metadata.json").write_text(json.dumps(metadata))


# Reading


@pytest.mark.parametrize("shape", [(32, 40, 3), (32, 40, 1), (32, 40)])
@pytest.mark.parametrize("key", ["", "image"])
@pytest.mark.filterwarnings("ignore")
def test_other_minari_datasets_are_read(tmp_path: Path, shape: tuple[int, ...], key: str) -> None:
    image = spaces.Box(0, 255, shape, np.uint8)
    space = spaces.Dict({key: image, "speed": spaces.Box(0, 1, (2,))}) if key else image
    storage = MinariStorage.new(tmp_path / "d", space, spaces.Discrete(2), jpeg_encoding=False)
    images = np.random.default_rng(0).integers(0, 256, (4, *shape), np.uint8)
    observations = {key: images, "speed": np.zeros((4, 2), np.float32)} if key else images
    ends = np.array([False, False, True])
    episode = EpisodeBuffer(
        observations=observations, actions=np.array([1, 0, 1]), rewards=np.ones(3), terminations=ends, truncations=~ends
    )
    storage.update_episodes([episode])
    data = load_episodes(tmp_path / "d")
    assert np.array_equal(data.frames, np.broadcast_to(images.reshape(4, 32, 40, -1), (4, 32, 40, 3)))
    assert data.actions.tolist() == [1, 0, 1, 0] and not data.repeated.any() and data.fps is None


def test_reading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the folder of a Minari dataset.*sfv-world collect"):
        load_episodes(tmp_path / "missing")
    MinariStorage.new(tmp_path / "vectors", spaces.Box(-1, 1, (4,)), spaces.Discrete(2))
    with pytest.raises(ValueError, match=r"expected image observations.*Box\(-1"):
        load_episodes(tmp_path / "vectors")
    MinariStorage.new(tmp_path / "empty", spaces.Box(0, 255, (8, 8, 3), np.uint8), spaces.Discrete(2))
    with pytest.raises(ValueError, match="at least one episode, got none"):
        load_episodes(tmp_path / "empty")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "actions",
            1.0001,
            r"action: expected values inside Box\(-1.0, 1.0, \(2,\), float32\), got .* to 1.0001.* Record again",
        ),
        ("actions", np.nan, "action: expected finite numbers, got NaN or infinity. Record again"),
        ("rewards", np.nan, "reward: expected a finite number, got nan. Record again"),
        ("rewards", -np.inf, "reward: expected a finite number, got -inf"),
    ],
)
def test_steps_that_no_world_learns_from_are_told(tmp_path: Path, name: str, value: float, said: str) -> None:
    path = record(tmp_path / "d", spaces.Box(-1, 1, (2,)), lengths=(3, 6, 2, 4))
    load_episodes(path)
    with h5py.File(path / "main_data.hdf5", "a") as file:
        file["episode_1"][name][-1] = value  # the action at an episode's last frame but one
    with pytest.raises(ValueError, match=rf"d, episode 1, step 4: {said}"):
        load_episodes(path)


def test_clips_of_nested_actions(tmp_path: Path) -> None:
    data = load_episodes(collect(config(tmp_path / "d", env="CounterTree-v0")))
    clips: Clips = ClipSampler(data, 4, 6, seed=0).batch(0)
    assert clips.actions["keys"].shape == (6, 3, 2)
    assert clips.actions["mouse"][0].shape == (6, 3, 2) and clips.actions["mouse"][1].shape == (6, 3)
    for b, t in np.argwhere(clips.valid[:, 1:]):
        assert clips.frames[b, t + 1, 1, 0, 0] == fingerprint(rows_of(clips.actions, (b, t)))
