"""The commands, run for real at a tiny size, as a user would type them."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import av
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from gymnasium import spaces
from gymnasium.wrappers import TransformAction
from pydantic import TypeAdapter
from stable_baselines3 import PPO

from sfv_world.card import train_options
from sfv_world.data.collect import CollectConfig, record_episode
from sfv_world.demo import DemoConfig, demo
from sfv_world.envs.real import make_real
from sfv_world.evaluation import EvaluateConfig, evaluate
from sfv_world.film import write_animation, write_video
from sfv_world.given import given_device
from sfv_world.training.codec import TrainCodecConfig, train_codec
from sfv_world.training.config import TrainConfig
from sfv_world.training.objective import ObjectiveConfig
from sfv_world.training.trainer import train


def run(*arguments, cwd, ok=True):
    command = [sys.executable, "-m", "sfv_world.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which a recording was made and a world was trained, by commands."""
    cwd = tmp_path_factory.mktemp("commands")
    run("collect", "--env", "doom-basic", "--out", "data", "--frames", 600, "--size", 16, cwd=cwd)
    options = ("--preset", "tiny", "--window", 3, "--clip", 4, "--held-out", 0.4, "--device", "cpu")
    run("train", "--data", "data", "--out", "world", "--steps", 4, *options, cwd=cwd)
    run("train", "--data", "data", "--out", "world", "--steps", 6, "--resume", *options, cwd=cwd)
    return cwd


def test_train_leaves_a_world(world):
    assert json.loads((world / "world/config.json").read_text())["about"]["steps"] == 6
    assert list((world / "world/tensorboard").glob("events*"))


def test_evaluate_writes_results_card_and_pictures(world):
    out = run(
        "evaluate",
        "--world",
        "world",
        "--data",
        "data",
        "--clips",
        2,
        "--rollouts",
        2,
        "--frames",
        30,
        "--out",
        "found",
        cwd=world,
    )
    results = json.loads((world / "found/results.json").read_text())
    assert results["rollouts"]["largest_certificate"] < 1e-3
    assert f"{results['density']['bits_per_dim']:.3f}" in out.stdout
    card = (world / "found/README.md").read_text()
    assert out.stdout.strip() in card
    assert "`sfv-world evaluate --world world --data data --clips 2 --rollouts 2 --frames 30` (" in card
    assert cv2.imread(str(world / "found/rollouts.png")) is not None


def test_a_card_is_of_the_folder_and_replaces_none_but_cards(world, tmp_path):
    copy = shutil.copytree(world / "world", tmp_path / "a copy", ignore=shutil.ignore_patterns("training*", "samples"))
    (copy / "README.md").write_text("mine")
    config = EvaluateConfig(str(copy), world / "data", clips=2, rollouts=1, frames=30)
    with pytest.raises(
        ValueError, match=r"out: expected a folder without a README.md that is no model card, found one"
    ):
        evaluate(config)
    assert (copy / "README.md").read_text() == "mine"
    (copy / "README.md").unlink()
    for _ in range(2):  # its own it replaces
        evaluate(config)
    card = (copy / "README.md").read_text()
    assert f'world="{copy}"' in card and f"evaluate --world '{copy}' --data" in card


def test_the_command_on_a_card_makes_the_run_of_the_card():
    config = TrainConfig(
        Path("data/x"), Path("runs/x"), steps=7, denoiser=False, kind="autoregressive", warmup=3,
        objective=ObjectiveConfig(action_dropout=0.2),
    )  # fmt: skip
    options = train_options(TypeAdapter(TrainConfig).dump_python(config, mode="json"))
    assert tyro.cli(TrainConfig, args=shlex.split(options)) == config


def test_demo_steps_and_films(world):
    out = run("demo", "--world", "world", "--episodes", 2, "--frames", 5, "--context", 3, "--out", "demo", cwd=world)
    assert "log-likelihood" in out.stdout + out.stderr
    assert cv2.imread(str(world / "demo/demo.png")).shape == (2 * 2 * 16, 5 * 16, 3)
    with av.open(str(world / "demo/demo.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5
    read, animation = cv2.imreadanimation(str(world / "demo/demo.webp"))
    assert read and len(animation.frames) == 5 and animation.frames[0].shape[:2] == (4 * 2 * 16, 4 * 2 * 16)


def test_demo_is_played_by_a_saved_agent(world, tmp_path, monkeypatch):
    agent = PPO("MlpPolicy", make_real("doom-basic", size=16), n_steps=8, batch_size=8, device="cpu")
    with torch.no_grad():
        agent.policy.action_net.bias.copy_(torch.tensor([0.0, 0.0, 99.0, 0.0]))
    agent.save(tmp_path / "ppo.zip")
    played = []
    record = lambda *args: played.append(record_episode(*args)) or played[-1]  # noqa: E731
    monkeypatch.setattr("sfv_world.demo.record_episode", record)
    config = DemoConfig(
        str(world / "world"), tmp_path, policy=str(tmp_path / "ppo.zip"), episodes=1, frames=3, context=3
    )
    demo(config)
    assert cv2.imread(str(tmp_path / "demo.png")).shape == (2 * 16, 3 * 16, 3)
    assert [set(np.asarray(episode.actions)) for episode in played] == [{2}]
    with pytest.raises(ValueError, match=r"policy: expected 'random' or the path of a Stable-Baselines3 agent"):
        demo(replace(config, policy="nobody"))


def test_animations_play_at_their_rate(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 1, 1, 3), np.uint8)
    frames = np.broadcast_to(frames, (3, 5, 7, 8, 8, 3)).transpose(0, 1, 3, 2, 4, 5).reshape(3, 40, 56, 3)
    write_animation(tmp_path / "film.webp", frames, 8.0, scale=2)
    read, animation = cv2.imreadanimation(str(tmp_path / "film.webp"))
    assert read and list(animation.durations) == [125] * 3 and animation.loop_count == 0
    shown = np.stack(animation.frames)[:, ::2, ::2, 2::-1].astype(float)
    assert np.abs(shown - frames).mean() < 25 and np.abs(shown[::-1] - frames).mean() > 50


def test_films_are_no_larger_than_their_encoders_make(tmp_path):
    write_video(tmp_path / "film.mp4", np.zeros((2, 5001, 9, 3), np.uint8), 10.0)
    with av.open(str(tmp_path / "film.mp4")) as film:
        assert (film.streams.video[0].height, film.streams.video[0].width) == (10002, 18)
    with pytest.raises(ValueError, match=r"film: expected frames of at most 8191 pixels a side, got 8192 x 9"):
        write_video(tmp_path / "film.mp4", np.zeros((2, 8192, 9, 3), np.uint8), 10.0)
    write_animation(tmp_path / "film.webp", np.zeros((2, 8191, 9, 3), np.uint8), 10.0)
    read, animation = cv2.imreadanimation(str(tmp_path / "film.webp"))
    assert read and animation.frames[0].shape[:2] == (16382, 18)


PARTS = spaces.Dict(a=spaces.Discrete(2), b=spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Discrete(3)]))


@pytest.fixture(params=[PARTS, spaces.Tuple([PARTS]), spaces.Discrete(3)], ids=["dict", "tuple", "discrete"])
def acted(request, build_world):
    """A world of 16 x 24 pixels whose recording names no environment, and `Acted-v0`, of the same actions, to begin in."""

    def make(render_mode=None):
        return TransformAction(gym.make("CartPole-v1", render_mode=render_mode), lambda _: 0, request.param)

    gym.register("Acted-v0", make)
    yield build_world(action_space=request.param)
    del gym.registry["Acted-v0"]


def test_demo_shows_any_world_beside_the_environment_it_is_given(acted, tmp_path):
    config = DemoConfig(str(acted), tmp_path, episodes=2, frames=4, context=3)
    with pytest.raises(
        ValueError, match=r"env: expected a real environment.*names none, got None. Give its id \(--env\)"
    ):
        demo(config)
    demo(replace(config, env="Acted-v0"))
    assert cv2.imread(str(tmp_path / "demo.png")).shape == (2 * 2 * 16, 4 * 24, 3)
    with av.open(str(tmp_path / "demo.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 4


def test_demo_asks_for_the_environment_where_a_world_says_nothing_of_its_data(build_world, tmp_path):
    folder = shutil.copytree(build_world(), tmp_path / "world")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "about": {}}))
    with pytest.raises(ValueError, match=r"env: expected a real environment.*Give its id \(--env\)"):
        demo(DemoConfig(str(folder), tmp_path))


evaluation = partial(EvaluateConfig, "world", Path("data"))
recording = partial(CollectConfig, "doom-basic", Path("data"))
training = partial(TrainConfig, Path("data"), Path("world"), steps=1, device="cpu")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("demo", "--world", "nowhere"), "world: expected"),
        (("demo", "--world", "world", "--device", "foo"), "device: expected"),
        (("calibrate", "--world", "world", "--device", "cuda:99"), "device: expected"),
        (("generate", "--world", "world", "--out", "a.mp4", "--device", "foo"), "device: expected"),
        (("train", "--data", "data", "--out", "new", "--steps", 1, "--device", "foo"), "device: expected"),
        (("train-codec", "--data", "data", "--out", "new", "--steps", 1, "--device", "foo"), "device: expected"),
        (("evaluate", "--world", "world", "--data", "nowhere"), "path: expected"),
        (("collect", "--env", "doom basic", "--out", "other"), "env_id: expected"),
        (
            ("demo", "--world", "world", "--env", "doom-takecover"),
            "env: expected one with the actions of world, Discrete(4)",
        ),
        (("demo", "--world", "world", "--episodes", 600), "film: expected frames of at most 8191"),
        (("evaluate", "--world", "world", "--data", "data", "--context", 900), "context: expected at most "),
        (("evaluate", "--world", "world", "--data", "data", "--out", "data/metadata.json/a"), "out: expected a folder"),
        (("convert", "world/config.json", "--out", "world/config.json"), "out: expected a folder"),
        (
            ("counterfactual", "--world", "world", "--data", "data", "--rows", 2000),
            "film: expected frames of at most 8191",
        ),
    ],
)
def test_mistakes_are_one_line(world, arguments, said):
    done = run(*arguments, cwd=world, ok=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"sfv-world: {said}")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (evaluation, {"rollouts": 0}, "rollouts: expected at least 1, got 0"),
        (evaluation, {"clips": 0}, "clips: expected at least 1, got 0"),
        (evaluation, {"context": 0}, "context: expected at least 1, got 0"),
        (evaluation, {"frames": 0}, "frames: expected at least 1, got 0"),
        (DemoConfig, {"frames": 0}, "frames: expected at least 1, got 0"),
        (DemoConfig, {"episodes": 0}, "episodes: expected at least 1, got 0"),
        (DemoConfig, {"context": 0}, "context: expected at least 1, got 0"),
        (recording, {"max_episode_steps": 0}, "max_episode_steps: expected at least 1, got 0"),
        (recording, {"frames_per_write": 0}, "frames_per_write: expected at least 1, got 0"),
        (DemoConfig, {"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        (training, {"learning_rate": -1.0}, "learning_rate: expected more than 0, got -1"),
        (training, {"gradient_clip": float("nan")}, "gradient_clip: expected more than 0, got nan"),
        (training, {"ema": 2.0}, "ema: expected at least 0 and less than 1, got 2"),
        (training, {"held_out": 0.0}, "held_out: expected more than 0 and less than 1, got 0"),
        (training, {"batch": 0}, "batch: expected more than 0, got 0"),
        (training, {"window": 0}, "window: expected more than 0, got 0"),
        (training, {"bands": -1}, "bands: expected none or at least 0, got -1"),
    ],
)
def test_numbers_out_of_range_are_told(make, changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_counted_from_one(threads, tmp_path):
    before = torch.get_num_threads()
    for run, config in (
        (train, replace(training(threads=threads), out=tmp_path)),
        (train_codec, TrainCodecConfig(tmp_path, tmp_path, steps=1, device="cpu", threads=threads)),
    ):
        with pytest.raises(ValueError, match=f"threads: expected none or at least 1, got {threads}"):
            run(config)
    assert torch.get_num_threads() == before


def test_devices_are_those_of_the_machine(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:1", torch.device("cuda", 1)):
        assert given_device(name) == torch.device(name)
    for name in ("foo", "", "mps", "cuda:2"):
        with pytest.raises(ValueError, match=rf"device: expected .*\(cpu, cpu:0, cuda, cuda:0, cuda:1\), got '{name}'"):
            given_device(name)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    with pytest.raises(ValueError, match=r"device: expected .*\(cpu, cpu:0\), got 'cuda'"):
        given_device("cuda")
