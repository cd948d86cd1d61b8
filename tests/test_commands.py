"""The commands, run for real at a tiny size, as a user would type them."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import av
import cv2
import pytest
import tyro
from pydantic import TypeAdapter

from sfv_world.card import train_options
from sfv_world.training.config import TrainConfig
from sfv_world.training.objective import ObjectiveConfig


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
    assert cv2.imread(str(world / "found/rollouts.png")) is not None


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
    assert cv2.imread(str(world / "demo/demo.png")).shape == (2 * 2 * 16, 16 * 16, 3)
    with av.open(str(world / "demo/demo.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 5


def test_mistakes_are_one_line(world):
    for arguments in (("demo", "--world", "nowhere"), ("evaluate", "--world", "world", "--data", "nowhere")):
        done = run(*arguments, cwd=world, ok=False)
        assert done.returncode == 2
        assert done.stderr.strip().splitlines()[-1].startswith("sfv-world: ")
        assert "Traceback" not in done.stderr
