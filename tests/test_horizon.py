"""Long horizons: what is measured is what it says, and the command finds what is wrong with a rollout that is."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from sfv_world import load_world
from sfv_world.chance import noise_of_observed
from sfv_world.checkpoint import save_model
from sfv_world.cli import main
from sfv_world.drift import colour_and_contrast, judged_imagined, squared_error, ssim, train_judge, typicality
from sfv_world.evaluation import split_as_trained
from sfv_world.film import as_shown
from sfv_world.free_run import HorizonConfig, beginnings, choose_episodes, free_run
from sfv_world.horizon import bin_edges, horizon
from sfv_world.model import WorldModel
from sfv_world.plot import Curve, Panel, draw

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (40, 16, 24, 3), np.uint8)


# Statistics


def test_colour_and_contrast():
    frames = np.zeros((2, 4, 6, 3), np.uint8)
    frames[1] = [10, 20, 30]
    frames[0, :2] = 200
    assert np.allclose(colour_and_contrast(frames), [[100, 100, 100, 100], [10, 20, 30, 0]])


def test_similarity_is_one_for_equal_frames_and_falls_with_noise():
    smooth = np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None] * 8, (3, 16, 24, 3)).copy()
    rough = np.clip(smooth + RNG.normal(0, [[[[5]]], [[[20]]], [[[80]]]], smooth.shape), 0, 255).astype(np.uint8)
    assert np.allclose(ssim(smooth, smooth), 1) and (squared_error(smooth, smooth) == 0).all()
    found = ssim(smooth, rough)
    assert 1 > found[0] > found[1] > found[2] > 0 and np.allclose(found, ssim(rough, smooth))
    assert squared_error(smooth[:1], smooth[:1] + np.uint8(3)).item() == 9
    # Of constant frames only the luminance differs: (2ab + c) / (a^2 + b^2 + c).
    a, b, c = 100, 150, (0.01 * 255) ** 2
    flat = [np.full((1, 16, 24, 3), value, np.uint8) for value in (a, b)]
    assert np.allclose(ssim(*flat), (2 * a * b + c) / (a**2 + b**2 + c))


def test_typicality_is_two_sided_and_uniform_for_real_frames():
    centre, compared, more = RNG.normal(3, 1, (3, 4000))
    p = typicality(more, centre, compared)
    assert np.allclose([np.mean(p < level) for level in (0.05, 0.25, 0.5)], [0.05, 0.25, 0.5], atol=0.02)
    low, usual, high = typicality(np.array([-2.0, 3.0, 8.0]), centre, compared)
    assert low == high == 1 / 4001 and usual > 0.95
    assert typicality(compared[:1], compared, compared[:1]).item() == 1


def test_a_judge_learns_what_can_be_told_and_nothing_else():
    bright = np.clip(NOISE.astype(int) + 60, 0, 255).astype(np.uint8)
    before = torch.get_rng_state()
    judge = train_judge(NOISE[:30], bright[:30], steps=60)
    assert torch.equal(before, torch.get_rng_state())
    assert not judged_imagined(judge, NOISE[30:]).any() and judged_imagined(judge, bright[30:]).all()
    again = train_judge(NOISE[:30], bright[:30], steps=60)
    assert all(torch.equal(a, b) for a, b in zip(judge.parameters(), again.parameters(), strict=True))


def test_bins_double_and_cover_the_horizon():
    assert bin_edges(1000) == [0, 8, 16, 32, 64, 128, 256, 512, 1000]
    assert bin_edges(5) == [0, 5] and bin_edges(8) == [0, 8] and bin_edges(9) == [0, 8, 9]
    for frames in range(1, 300):
        edges = bin_edges(frames)
        assert edges[0] == 0 and edges[-1] == frames and edges == sorted(set(edges))


def test_plots_survive_what_is_missing():
    x = np.arange(1.0, 9)
    curve = Curve("gaps", x, np.where(x % 3 == 0, np.nan, x))
    empty, one = Curve("nothing", x, np.full(8, np.nan)), Curve("one", np.ones(1), np.ones(1))
    image = draw([Panel("a", [curve], [(2.0, 3.0, (0, 0, 255))]), Panel("b", [empty]), Panel("c", [one])])
    assert image.dtype == np.uint8 and image.shape[0] == 2 * 300 and (image < 255).any()


# Rollouts


@pytest.fixture
def config(home):
    return HorizonConfig(
        str(home / "world"), home / "data", home / "out", frames=30, rows=4, context=4, references=20, seed=3
    )


def begun(config):
    world = load_world(config.world)
    held_out = split_as_trained(world, config.data)[1]
    episodes = choose_episodes(held_out, config)
    return world, held_out, episodes, beginnings(held_out, episodes, config)


def test_episodes_begin_and_act_as_real_ones(config):
    _, held_out, episodes, begin = begun(config)
    assert not set(episodes[0::2]) & set(episodes[1::2])
    for row, episode in enumerate(episodes):
        first, end = held_out.starts[episode], held_out.ends[episode]
        length = end - first
        assert np.array_equal(begin.frames[row], held_out.frames[first : first + 4])
        assert begin.real_lengths[row] == length - 4
        assert np.array_equal(begin.real[row, : length - 4], held_out.frames[first + 4 : end])
        assert np.array_equal(begin.actions[row, : length - 1], held_out.actions[first : end - 1])
    assert begin.actions.shape == (4, 3 + 30)


def test_a_window_slides_on_as_steps_do(config):
    world, _, _, begin = begun(config)
    found = free_run(world, begin, replace(config, frames=6))
    state = world.reset(begin.frames, begin.actions[:, :3], 3 * 1_000_000_007 + np.arange(4))
    for n in range(6):
        state, output = world.step(state, begin.actions[:, 3 + n])
        assert np.array_equal(found.frames[:, n], output.frames.numpy())
        assert np.array_equal(found.terminated[:, n], output.terminated.numpy())
        assert np.allclose(found.bits[:, n], output.bits_per_dim)
    assert 0 < found.certificate <= world.decoding.tolerance


def test_a_restart_forgets_all_but_the_context_and_draws_anew(config):
    world, _, _, begin = begun(config)
    config = replace(config, restart=5, context=4)
    found = free_run(world, begin, replace(config, frames=12))
    kept = free_run(world, begin, replace(config, frames=12, restart=None))
    assert np.array_equal(found.frames[:, :5], kept.frames[:, :5])
    assert not np.array_equal(found.frames[:, 5], kept.frames[:, 5])
    seeds = 3 * 1_000_000_007 + 4 + np.arange(4)
    state = world.reset(found.frames[:, 1:5], begin.actions[:, 5:8], seeds, noised=True)
    for n in range(5, 10):
        state, output = world.step(state, begin.actions[:, 3 + n])
        assert np.array_equal(found.frames[:, n], output.frames.numpy())


def test_rows_that_must_live_on_are_drawn_anew_where_they_end(config):
    world, _, _, begin = begun(config)
    with torch.no_grad():  # a world in which about every tenth frame ends an episode, whatever it shows
        world.model.heads.mlp[-1].weight[0] = 0
        world.model.heads.mlp[-1].bias[0] = np.log(0.1 / 0.9)
    config = replace(config, frames=12, rows=4)
    kept, found = free_run(world, begin, config), free_run(world, begin, replace(config, survive=5))
    assert kept.terminated.any() and not found.terminated.any()
    ended = np.stack([kept.terminated[:, part].any(1) for part in (slice(0, 5), slice(5, 10), slice(10, 12))], 1)
    for row in range(4):  # the frames are the same up to the first stretch with an end, and others after it
        same = 5 * int(ended[row].argmax()) if ended[row].any() else 12
        assert np.array_equal(found.frames[row, :same], kept.frames[row, :same])
        assert same == 12 or not np.array_equal(found.frames[row, same], kept.frames[row, same])
    with pytest.raises(ValueError, match="survive: expected none or at least 1, without stop, got 5 and stop True"):
        replace(config, survive=5, stop=True)


def test_attempts_to_live_on_differ_after_a_restart_too(config):
    world, _, _, begin = begun(config)
    with torch.no_grad():  # as above
        world.model.heads.mlp[-1].weight[0] = 0
        world.model.heads.mlp[-1].bias[0] = np.log(0.1 / 0.9)
    config = replace(config, frames=12, restart=4, survive=4)
    kept, found = free_run(world, begin, replace(config, survive=None)), free_run(world, begin, config)
    assert kept.terminated[:, 4:].any() and not found.terminated.any()


def test_noise_of_projected_frames_is_not_what_they_were_drawn_from(config):
    world, _, _, begin = begun(config)
    seeds = 3 * 1_000_000_007 + np.arange(4)
    state = world.reset(begin.frames, begin.actions[:, :3], seeds)
    drawn = noise_of_observed(seeds, state.ages, 1, world.frame_shape, world.frame_shape)[1][:, 0]
    world.decoding = replace(world.decoding, denoise="causal")
    clean = world.step(state, begin.actions[:, 3])[1].frames.numpy().astype(float)
    world.decoding = replace(world.decoding, denoise="none")
    found = free_run(world, begin, replace(config, frames=1, project=True)).frames[:, 0]
    inside = (clean > 40) & (clean < 215)
    added = (found - clean)[inside]
    assert inside.sum() > 1000 and abs(added.std() - 0.05 * 127.5) < 0.5
    assert abs(np.corrcoef(added, drawn[inside])[0, 1]) < 0.1


def test_projected_frames_are_read_clean_and_noised_afresh(config):
    world, _, _, begin = begun(config)
    with torch.no_grad():  # a denoiser that shows every frame much brighter: its frames must be what is read
        world.model.denoiser.proj_out.bias[0] += 300
    found = free_run(world, begin, replace(config, frames=3, project=True))
    kept = free_run(world, begin, replace(config, frames=3))
    assert np.array_equal(found.bits[:, 0], kept.bits[:, 0]) and not np.allclose(found.bits[:, 1], kept.bits[:, 1])
    assert found.frames[:, 0].mean() > kept.frames[:, 0].mean() + 20
    with pytest.raises(ValueError, match="project: expected a world with a denoiser"):
        bare = replace(world.model.config, denoiser=None)
        save_model(config.out, WorldModel(bare, world.action_space), world.about)
        horizon(replace(config, world=str(config.out), project=True))


def test_stopping_ends_with_the_last_termination(config):
    world, _, _, begin = begun(config)
    with torch.no_grad():
        world.model.heads.mlp[-1].bias[0] += 5  # about one frame in two ends an episode
    found = free_run(world, begin, replace(config, stop=True))
    last = found.terminated.argmax(axis=1).max()
    assert found.terminated.any(axis=1).all() and last < 29 and not found.terminated[:, last + 1 :].any()
    assert (found.frames[:, last:] == found.frames[:, last : last + 1]).all()


def test_real_frames_are_noised_as_imagined_ones_are(config):
    world, *_ = begun(config)
    flat = np.full((300, 16, 24, 3), 128, np.uint8)
    found = as_shown(world, flat, 0).astype(float) - 128
    assert abs(found.mean()) < 0.1 and abs(found.std() - 0.05 * 128) < 0.1


# The command


def test_the_command_measures_and_draws(home, config, capsys):
    options = ("--frames", "30", "--rows", "4", "--context", "4", "--references", "20", "--restart", "7")
    files = ("--world", str(home / "world"), "--data", str(home / "data"), "--out", str(home / "out"))
    main(["horizon", *files, *options, "--temperature", "0.9"])
    out = capsys.readouterr().out
    assert "reset every 7 frames, temperature 0.9" in out and "1-8 " in out
    found = json.loads((home / "out/horizon.json").read_text())
    assert [entry["steps"] for entry in found["bins"]] == [[1, 8], [9, 16], [17, 30]]
    assert [entry["frames"] for entry in found["bins"]] == [32, 32, 56]
    first, _, last = found["bins"]
    # Random weights imagine nothing like the recording, and that can be told.
    assert first["psnr"] < first["psnr_of_copying"] and first["ssim"] < first["ssim_of_copying"] <= 1
    assert last["psnr"] is None and last["real"] == {"frames": 0}
    assert first["judge_accuracy"] > 0.9 and found["real"]["judged_real"] > 0.9
    assert 0.7 < found["real"]["in_range_of_real"] <= 1
    assert len(found["by_step"]["bits_per_dim"]) == 30
    assert found["largest_certificate"] <= 1e-3
    assert cv2.imread(str(home / "out/horizon.png")).shape == (4 * 300, 2 * 560, 3)
    steps = len(np.unique(np.geomspace(1, 30, 16).round()))
    assert cv2.imread(str(home / "out/frames.png")).shape == (4 * 16, (1 + steps) * 24, 3)


def test_a_stopped_row_counts_no_longer(config):
    found = horizon(replace(config, stop=True))
    ends = [step or 30 for step in found["first_termination"]]
    assert sum(entry["frames"] for entry in found["bins"]) == sum(ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"seed": 2**32}, r"seed: expected 0 to 2\*\*32 - 1, got 4294967296"),
        ({"rows": 1}, "rows: expected at least 2, got 1"),
        ({"restart": 3}, "restart: expected none or at least 4, the context that is kept, got 3"),
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1"),
        ({"frames": 10**12}, "memory: expected about .* GB free on cpu .*Imagine fewer frames or rows"),
        ({"context": 30}, "context: expected at least 2 held-out episodes of more than 30 frames, got 0"),
    ],
)
def test_impossible_wishes_are_refused(config, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        horizon(replace(config, out=tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()
