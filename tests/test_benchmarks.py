"""The benchmark commands, run for real at a tiny size: they print tables and leave JSON of the machine and the commit."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recorded import LENGTHS

from sfv_world import load_world
from sfv_world.data.clips import load_episodes
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.evaluation import split_as_trained
from sfv_world.training.config import TrainConfig
from sfv_world.training.trainer import train

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "doom"
    return collect(CollectConfig(env="doom-basic", out=out, frames=200, size=16))


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """Runs a benchmark as `python benchmarks/NAME.py` does, in this process; gives its output and its tables."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)

    def run(name, *arguments):
        script = BENCHMARKS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments), "--threads", "1", "--out", "found.json"])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out, tables(name)

    return run


def tables(name):
    found = json.loads(Path("found.json").read_text())
    assert found["commit"] and found["machine"] and found["threads"] == 1 and "torch" in found["versions"]
    assert found["command"].startswith(f"python benchmarks/{name}.py")
    return found["tables"]


@pytest.mark.parametrize("kind", ["autoregressive", "bands"])
def test_speed(benchmark, build_world, kind):
    few = ("--batches", 1, 2, "--steps", 3, "--horizon", 12, "--seconds", 1)
    out, found = benchmark("speed", "--world", build_world(kind), "--device", "cpu", *few)
    assert [row["batch"] for row in found["batch"]["rows"]] == [1, 2]
    assert found["batch"]["rows"][0]["goal"] == 60 and found["latency"]["rows"][0]["p50_ms"] > 0
    assert sum(row["share"] for row in found["share"]["rows"]) == pytest.approx(1)
    assert all(row["ms_a_step"] > 0 for row in found["share"]["rows"])
    assert found["bounds"]["rows"][0]["gflop_a_frame"] > 0
    assert len({row["cache_bytes"] for row in found["horizon"]["rows"]}) == 1
    assert found["horizon"]["rows"][-1]["step"] == 12
    assert {row["verdict"] for row in found["goals"]["rows"]} <= {"reached", "missed"}
    assert "| goal | found | verdict | what bounds it |" in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_speed_of_recorded_steps(benchmark, build_world):
    few = ("--batches", 1, 2, "--steps", 3, "--horizon", 12, "--seconds", 1)
    _, found = benchmark("speed", "--world", build_world("bands"), "--device", "cuda", "--record", *few)
    assert found["batch"]["rows"][0]["goal"] == 100 and found["horizon"]["rows"][-1]["device_mb"] >= 0
    shares = {row["part"]: row["share"] for row in found["share"]["rows"]}  # what is replayed cannot be taken apart
    assert found["share"]["title"].endswith("without recordings") and shares["deep flow"] > 0
    assert found["bounds"]["rows"][0]["gflop_a_frame"] > 0


def test_decoding(benchmark, recording):
    kinds = ("--grids", 2, "--kinds", "autoregressive", "frame-parallel-raster", "frame-parallel")
    sizes = ("--train-steps", 2, "--frames", 1, "--held-out", 0.4)
    out, found = benchmark("decoding", "--data", recording, *kinds, *sizes)
    rows = {row["decoding"]: row for row in found["autoregressive-4"]["rows"]}
    assert rows["sequential"]["deep_passes"] == 4 and rows["sequential"]["distance_to_sequential"] == 0
    assert all(row["distance_to_sequential"] < 1e-2 and row["largest_certificate"] < 1e-3 for row in rows.values())
    assert found["autoregressive-4"]["trained_steps"] == 2 and "trained 2 steps on 16 frames" in out
    assert found["frame-parallel-4"]["rows"][0]["deep_passes"] == 1
    ways = [
        {row["decoding"] for row in found[f"{kind}-4"]["rows"]} for kind in ("autoregressive", "frame-parallel-raster")
    ]
    assert ways[0] - ways[1] == {"Jacobi from learned"} and ways[1] > {"sequential", "Jacobi from fields"}


def test_decoding_says_what_a_grid_must_be(benchmark, recording, capsys):
    with pytest.raises(SystemExit):
        benchmark("decoding", "--data", recording, "--grids", 5)
    assert "grids: expected divisors" in capsys.readouterr().err


def test_learning(recording, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codec = ("train-codec", "--data", recording, "--out", "codec", "--steps", 3, "--held-out", 0.4, "--base", 32)
    subprocess.run([sys.executable, "-m", "sfv_world", *map(str, codec)], check=True, capture_output=True, timeout=300)
    kinds = ("--kinds", "frame-parallel", "autoregressive", "latent", "--codec", "codec")
    training = ("--minutes", 0.005, "--preset", "tiny", "--window", 3, "--clip", 4, "--held-out", 0.4)
    measuring = ("--clips", 2, "--rollouts", 1, "--frames", 30, "--batches", 1, 2, "--steps", 3)
    arguments = (
        "--data",
        recording,
        "--device",
        "cpu",
        "--threads",
        1,
        "--out",
        "found.json",
        *training,
        *measuring,
        *kinds,
    )
    command = [sys.executable, BENCHMARKS / "learning.py", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = tables("learning")["learning"]["rows"]
    assert [row["world"] for row in rows] == ["frame-parallel", "autoregressive", "latent"]
    assert all(row["bits_without_loss"] > 0 for row in rows)
    assert all(row["training_frames_per_second"] > 0 and row["ms_a_frame_at_batch_2"] > 0 for row in rows)
    assert all(row["steps"] >= 1 and row["largest_certificate"] < 1e-3 and "psnr_16" in row for row in rows)


def test_agents_that_learned_in_a_world_are_judged_in_its_game(benchmark, tmp_path):
    data = collect(CollectConfig(env="doom-basic", out=tmp_path / "data", frames=160, size=40))  # a CNN wants 36 pixels
    tiny = {"preset": "tiny", "window": 2, "clip": 3, "held_out": 0.4, "denoiser": False, "device": "cpu"}
    train(TrainConfig(data=data, out=tmp_path / "world", steps=1, minutes=None, threads=1, **tiny))
    few = ("--steps", 256, "--judged", 1, "--rows", 2, "--episodes", 2, "--seeds", 3)
    plain = ("--denoise", "none", "--device", "cpu")
    _, found = benchmark("imagination", "--world", tmp_path / "world", *few, *plain)
    rows = found["imagination"]["rows"]
    assert {path.name for path in Path().glob("*.zip")} == {"ppo-world-3.zip", "ppo-game-3.zip"}
    learned = [("world", 0), ("world", 256), ("game", 0), ("game", 256)]
    assert [(row["learned_in"], row["steps"]) for row in rows] == learned
    same = {"learned_in", "earned_there"}  # nobody has learned yet, and who judges is seeded
    assert {k: v for k, v in rows[0].items() if k not in same} == {k: v for k, v in rows[2].items() if k not in same}
    assert all(0 < row["steps_lasted_in_the_game"] <= 75 and 0 <= row["ended_in_the_game"] <= 1 for row in rows)


def test_agents_are_judged_in_recorded_games_only(monkeypatch, home):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from imagination import recorded_game

    world = load_world(home / "world")
    world.about["data"] = {"recipe": {"env": "doom-basic", "size": 16, "frame_skip": 4}}
    with pytest.raises(ValueError, match="world: expected frames of at least 36 pixels a side, got 16"):
        recorded_game(world)
    world.about["data"] = {}
    with pytest.raises(ValueError, match="world: expected one that learned from a recording of `sfv-world collect`"):
        recorded_game(world)


@pytest.mark.parametrize("ends", [True, False])
def test_random_play_is_held_against_all_recorded_episodes(monkeypatch, home, ends):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from behaviour import BehaviourConfig, random_play

    world = load_world(home / "world")
    with torch.no_grad():
        world.model.heads.mlp[-1].bias[0] = 100.0 if ends else -100.0
    config = BehaviourConfig(str(home / "world"), home / "data", episodes=10, steps=15)
    found = random_play(world, *split_as_trained(world, home / "data"), config)
    real, imagined = found["real"], found["imagined"]
    assert (real["episodes"], imagined["episodes"]) == (len(LENGTHS), 10)
    assert real["ended"]["mean"] == np.mean([length - 1 <= 15 for length in LENGTHS])
    assert real["steps"]["mean"] == np.mean([min(length - 1, 15) for length in LENGTHS])
    assert imagined["ended"] == {"mean": float(ends), "error": 0}
    assert imagined["steps"] == {"mean": 4 if ends else 15, "error": 0}


def test_what_unusual_options_find_leaves_the_worlds_own_alone(monkeypatch, home, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import behaviour

    few = behaviour.BehaviourConfig(str(home / "world"), home / "data", episodes=3, rows=2, steps=9)
    with pytest.raises(ValueError, match=r"out: expected a folder for what these options find, .*got none. Name one"):
        behaviour.main(few)
    found = behaviour.main(replace(few, out=tmp_path / "found"))
    assert json.loads((tmp_path / "found/behaviour.json").read_text()) == found
    assert found["measured"]["episodes"] == 3 and not (home / "world/behaviour.json").exists()


def test_what_is_asked_of_a_game_is_asked_of_any_world_of_it(monkeypatch, recording):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from behaviour import MOVES, game_of

    assert game_of(load_episodes(recording)) in MOVES
