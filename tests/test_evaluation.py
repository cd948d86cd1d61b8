"""What evaluation measures, against recordings whose numbers are known, and the world's own verbs."""

import json
import math
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage
from recorded import trained

from sfv_world import World, evaluation, load_world
from sfv_world.card import tables
from sfv_world.data.clips import take
from sfv_world.evaluation import (
    HORIZONS,
    EvaluateConfig,
    _error,
    density,
    evaluate,
    outcomes,
    rollouts,
    split_as_trained,
)
from sfv_world.world import Score

STEP = 3
"""Levels that all pixels of a frame are brighter than those of the frame before."""
ABOUT = {"dataset_id": "made-up-v0", "recipe": {"env": "made up"}}


@pytest.fixture(scope="module")
def home(build_world, tmp_path_factory):
    """A folder with a recording, `data`, of frames that grow brighter, and a tiny world that says it was trained on it, `world`."""
    home, rng = tmp_path_factory.mktemp("evaluation"), np.random.default_rng(0)
    space = spaces.Box(0, 255, (16, 24, 3), np.uint8)
    storage = MinariStorage.new(home / "data", space, spaces.Discrete(3), data_format="hdf5", jpeg_encoding=False)
    for number, length in enumerate(rng.integers(26, 34, size=16)):
        ends = (np.arange(1, length) == length - 1) & (number % 4 > 0)
        light = 40 + STEP * np.arange(length, dtype=np.uint8)
        storage.update_episodes(
            [
                EpisodeBuffer(
                    observations=np.broadcast_to(light[:, None, None, None], (length, *space.shape)).copy(),
                    actions=rng.integers(3, size=length - 1),
                    rewards=np.where(ends, -7.0, rng.integers(1, 4, size=length - 1)),
                    terminations=ends,
                    truncations=np.zeros(length - 1, bool),
                )
            ]
        )
    storage.update_metadata(ABOUT)
    trained(build_world("bands"), home / "world")
    return home


@pytest.fixture(scope="module")
def world(home):
    return load_world(home / "world")


@pytest.fixture(scope="module")
def split(home, world):
    return split_as_trained(world, home / "data")


def test_every_held_out_frame_is_scored_once(world, split):
    train, held_out = split
    found = density(world, train, held_out, frames=10_000, seed=0)
    assert found["frames"] == (held_out.lengths - 1).sum()
    bits = []
    for start, end in zip(held_out.starts, held_out.ends, strict=True):
        frames, actions = held_out.frames[start:end], take(held_out.actions, np.s_[start : end - 1])
        bits.append(world.score(frames[None], actions[None]).bits_per_dim[0, 1:].numpy())
    assert found["bits_per_dim"] == pytest.approx(np.concatenate(bits).mean(), abs=0.02)
    few = density(world, train, held_out, frames=60, seed=0)
    assert 0 < few["frames"] <= 60 < found["frames"] and found["bits_per_dim_error"] > 0


def test_repeated_screens_are_no_frames_and_full_context_is_half_a_clip_or_more(world, split, monkeypatch):
    """Bits that say how many frames are before the frame: 1 to 15, then again, as clips are cut."""

    def score(self, frames, *given):
        before = torch.arange(frames.shape[1], dtype=torch.float32).expand(len(frames), -1)
        return Score(before, before, before[..., None].repeat(1, 1, 2), before)

    monkeypatch.setattr(World, "score", score)
    train, held_out = split
    last = held_out.ends - 1
    repeated = replace(held_out, repeated=np.isin(np.arange(len(held_out.frames)), last))
    for episodes, screens in (held_out, held_out.lengths), (repeated, held_out.lengths - 1):
        found = density(world, train, episodes, frames=10_000, seed=0)
        before = np.concatenate([(np.arange(1, count) - 1) % 15 + 1 for count in screens])
        assert found["frames"] == len(before)
        assert found["bits_per_dim"] == pytest.approx(before.mean())
        assert found["bits_per_dim_full_context"] == pytest.approx(before[before >= 8].mean())


def test_a_fitted_copy_of_what_never_surprises_costs_the_noise_alone(world, split):
    found = density(world, *split, frames=10_000, seed=0)
    cell = 1 / 128  # in which a value of [-1, 1] is dequantised
    expected = 0.5 * math.log2(2 * math.pi * math.e * (world.model.config.noise**2 + cell**2 / 12))
    assert found["bits_per_dim_fitted_copy"] == pytest.approx(expected, abs=2e-3)
    assert found["bits_per_dim_of_the_noise"] < expected


def test_outcomes_are_those_of_observing_step_by_step(world, split):
    train, held_out = split
    found = outcomes(world, train, held_out, seed=0)
    chances, ended, errors = [], [], []
    for start, end in zip(held_out.starts, held_out.ends, strict=True):
        state = world.reset(held_out.frames[None, start : start + 1], seeds=[0])
        for row in range(start + 1, end):
            state, output = world.observe(state, held_out.actions[row - 1 : row], held_out.frames[None, row])
            chances.append(output.termination_probability.item())
            ended.append(held_out.terminations[row])
            errors.append(output.rewards[0, int(ended[-1])].item() - held_out.rewards[row])
    chances, ended, errors = np.array(chances), np.array(ended), np.array(errors)
    assert found["frames"] == len(chances) == sum(row["frames"] for row in found["termination_reliability"])
    assert found["termination_brier"] == pytest.approx(np.square(chances - ended).mean(), abs=1e-4)
    assert found["termination_brier_of_the_base_rate"] == pytest.approx(ended.mean() * (1 - ended.mean()))
    assert found["reward_mean_absolute_error"] == pytest.approx(np.abs(errors).mean(), abs=1e-3)
    assert found["reward_bias"] == pytest.approx(errors.mean(), abs=1e-3)
    for row in found["termination_reliability"]:
        inside = (chances >= row["from"]) & (chances < row["to"] + 1e-9)
        assert row["predicted"] == pytest.approx(chances[inside].mean(), abs=1e-3)
        assert row["observed"] == pytest.approx(ended[inside].mean(), abs=1e-3)


def test_long_episodes_are_read_in_parts(world, split, monkeypatch):
    train, held_out = split
    whole, read, score = outcomes(world, train, held_out, seed=0), [], World.score
    monkeypatch.setattr(evaluation, "LONGEST", 10)
    monkeypatch.setattr(World, "score", lambda self, frames, *args: read.append(frames) or score(self, frames, *args))
    parts = outcomes(world, train, held_out, seed=0)
    lead = 2 * world.model.midstream.start
    assert max(frames.shape[1] for frames in read) == 10 + lead + 1 < held_out.lengths.max()
    same = ("frames", "termination_brier_of_the_base_rate", "reward_mean_absolute_error_of_the_median")
    assert {name: parts[name] for name in same} == {name: whole[name] for name in same}
    for name in ("termination_brier", "reward_mean_absolute_error", "reward_bias"):
        assert parts[name] == pytest.approx(whole[name], abs=1e-3)


def test_the_rewards_baseline_is_told_of_the_end_as_the_world_is(world, split):
    train, held_out = split
    within = np.ones(len(held_out.frames), bool)
    within[held_out.starts] = False  # nothing is earned on arriving at an episode's first frame
    median = np.median(train.rewards[train.rewards > 0])
    expected = np.where(held_out.terminations, 0, np.abs(held_out.rewards - median))[
        within
    ].mean()  # all ends cost the same
    found = outcomes(world, train, held_out, seed=0)
    assert found["reward_mean_absolute_error_of_the_median"] == pytest.approx(expected)


def test_copying_falls_behind_as_frames_change(home, world, split):
    config = EvaluateConfig(str(home / "world"), home / "data", clips=12, rollouts=2, context=3)
    found = rollouts(world, split[1], config)
    for horizon, decibels in found["psnr_of_copying"]["decibels"].items():
        assert decibels == pytest.approx(20 * math.log10(255 / (STEP * horizon)))
        assert found["psnr_of_copying"]["error"][horizon] == pytest.approx(0, abs=1e-9)  # in all clips the same
        of_mean, gain = found["psnr_of_the_mean"], found["gain_over_copying"]
        assert of_mean["decibels"][horizon] > found["psnr_of_one"]["decibels"][horizon]
        assert gain["decibels"][horizon] == pytest.approx(of_mean["decibels"][horizon] - decibels)
        assert gain["error"][horizon] == pytest.approx(of_mean["error"][horizon])  # the copy's has none
        assert found["psnr_of_one"]["error"][horizon] > 0


def test_errors_are_those_of_independent_episodes():
    rng = np.random.default_rng(1)
    episodes = np.repeat(np.arange(200), 5)
    values = rng.standard_normal(200)[episodes, None]  # the same throughout an episode
    assert _error(values, episodes, lambda means: means[:, 0]) == pytest.approx(200**-0.5, rel=0.15)


def test_one_episode_says_nothing_of_others(home, world, split):
    train, held_out = split
    config = EvaluateConfig(str(home / "world"), home / "data", clips=2, rollouts=1, context=3)

    def measured(episodes):
        results = {
            "density": density(world, train, episodes, frames=10_000, seed=0),
            "outcomes": outcomes(world, train, episodes, seed=0),
            "rollouts": rollouts(world, episodes, config),
        }
        return results, tables(json.loads(json.dumps(results)))

    results, table = measured(held_out.select(np.array([0])))
    assert results["density"]["bits_per_dim_error"] is None
    assert set(results["rollouts"]["gain_over_copying"]["error"].values()) == {None}
    assert table.count("±") - 1 == table.count("± ?") == 1 + 5 * len(HORIZONS)  # one is of the text
    assert "± ?" not in measured(held_out)[1]


def test_another_recording_is_refused(home, world):
    def trained_on(**data):
        return World(world.model, about={**world.about, "data": data})

    split_as_trained(
        trained_on(dataset_id="copied-v0", recipe=ABOUT["recipe"]), home / "data"
    )  # it is what made it that counts
    for data in ({"dataset_id": "made-up-v0", "recipe": {"env": "else"}}, {"dataset_id": "else-v0"}):
        with pytest.raises(
            ValueError, match=r"data: expected the recording that .* was trained on, .*else.*, got .*made up"
        ):
            split_as_trained(trained_on(**data), home / "data")


def test_episodes_too_short_to_roll_out_are_told(home, build_world, tmp_path):
    storage = MinariStorage.new(
        tmp_path / "data",
        spaces.Box(0, 255, (16, 24, 3), np.uint8),
        spaces.Discrete(3),
        data_format="hdf5",
        jpeg_encoding=False,
    )
    few = dict(
        actions=np.zeros(9, int), rewards=np.zeros(9), terminations=np.zeros(9, bool), truncations=np.zeros(9, bool)
    )
    storage.update_episodes([EpisodeBuffer(observations=np.zeros((10, 16, 24, 3), np.uint8), **few) for _ in range(4)])
    with pytest.raises(ValueError, match=r"data: expected a held-out episode of at least 18 frames .* got at most 10"):
        evaluate(EvaluateConfig(str(home / "world"), tmp_path / "data", out=tmp_path / "found"))


def test_nothing_measured_is_lost_for_want_of_a_place(home, monkeypatch, capsys):
    """A world in the read-only folder of a package is told before minutes are spent; a disk that fills up costs the files alone."""
    few = EvaluateConfig(str(home / "world"), home / "data", clips=2, rollouts=1, frames=30)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        patch.setattr(evaluation, "density", None)
        with pytest.raises(ValueError, match=r"out: expected a folder that can be written to, .* Name another"):
            evaluate(few)

    def full(path):
        raise OSError("No space left on device")

    monkeypatch.setattr(evaluation, "replacing", full)
    with pytest.raises(OSError, match="No space"):
        evaluate(few)
    assert "held-out clips under their real actions" in capsys.readouterr().out
