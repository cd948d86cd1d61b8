"""Counterfactuals: noise found in real frames gives them back, and another action changes them from there on."""

from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
import torch
from gymnasium import spaces
from recorded import record

from sfv_world import World, load_world
from sfv_world.cli import main
from sfv_world.counterfactual import CounterfactualConfig, changed_actions, counterfactual, parse_action, replay

FRAMES, CONTEXT = 11, 2  # more than three windows of the tiny worlds after the context
ACTIONS = np.random.default_rng(1).integers(0, 3, (3, FRAMES - 1))
VIDEO = np.random.default_rng(0).integers(0, 256, (3, FRAMES, 16, 24, 3), np.uint8)
SEEDS = [4, 5, 2**63 - 1]


@pytest.fixture(scope="module")
def abduction(tiny_world):
    return tiny_world.abduct(VIDEO, ACTIONS, SEEDS, CONTEXT)


def levels(a, b):
    return (a.int() - b.int()).abs()


# Laws


def test_the_noise_and_likelihood_are_those_of_a_parallel_pass(tiny_world, abduction):
    tokens = tiny_world._noised(torch.from_numpy(VIDEO), np.array(SEEDS), np.zeros(3, np.int64))
    vectors = torch.cat([torch.zeros(3, 1, 3), torch.eye(3)[ACTIONS]], dim=1)
    reading = tiny_world.model(tokens, vectors, torch.arange(FRAMES).expand(3, -1) > 0)
    assert torch.allclose(abduction.noise, reading.encoding.noise[:, CONTEXT:], atol=1e-4)
    score = tiny_world.score(VIDEO, ACTIONS, SEEDS)
    assert torch.allclose(abduction.log_likelihood, score.log_likelihood[:, CONTEXT:], rtol=1e-5, atol=1e-3)


def test_the_same_noise_and_actions_give_the_frames_back(tiny_world):
    world = World(tiny_world.model, replace(tiny_world.decoding, tolerance=1e-5, temperature=0.5))
    abduction = world.abduct(VIDEO, ACTIONS, SEEDS, CONTEXT)
    state, observed = abduction.state[:], abduction.state[:]
    for n in range(CONTEXT, FRAMES):
        observed, seen = world.observe(observed, ACTIONS[:, n - 1], VIDEO[:, n])
        state, output = world.step(state, ACTIONS[:, n - 1], abduction.noise[:, n - CONTEXT])
        assert torch.equal(seen.noise, abduction.noise[:, n - CONTEXT])
        assert torch.allclose(state.stream.tokens, observed.stream.tokens, atol=1e-4)
        assert torch.allclose(output.log_likelihood, abduction.log_likelihood[:, n - CONTEXT], atol=1e-2)
        apart = levels(output.frames, abduction.frames[:, n - CONTEXT])
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.005  # a value on the border of its cell
    # What is given back are the real frames with the world's noise, 0.05 of 1 or 6.4 levels.
    apart = levels(abduction.frames, torch.from_numpy(VIDEO[:, CONTEXT:]))
    assert 3 < apart.float().mean() < 8


def test_the_usual_tolerance_gives_the_frames_back_within_one_level(tiny_world, abduction):
    for n, output in enumerate(replay(tiny_world, abduction, ACTIONS[:, CONTEXT - 1 :])):
        apart = levels(output.frames, abduction.frames[:, n])
        assert apart.max() <= 1 and (apart > 0).float().mean() < 0.02
        assert torch.allclose(output.log_likelihood, abduction.log_likelihood[:, n], atol=1)


def test_another_action_changes_its_frame_and_later_ones_and_none_before(tiny_world, abduction):
    after = ACTIONS[:, CONTEXT - 1 :]
    changed = changed_actions(after, [(action + 1) % 3 for action in after[:, 3]], at=3, hold=1)
    assert (changed != after).sum() == 3 and (changed[:, 3] != after[:, 3]).all()
    same, other = list(replay(tiny_world, abduction, after)), list(replay(tiny_world, abduction, changed))
    for n, (one, two) in enumerate(zip(same, other, strict=True)):
        if n < 3:
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
        else:
            differ = one.log_likelihood != two.log_likelihood
            assert n > 4 or (differ.all() if n == 3 else differ.any())
            assert torch.allclose(two.noise, abduction.noise[:, n], atol=2 * tiny_world.decoding.tolerance)
    assert (levels(same[3].frames, other[3].frames) > 0).any()


def test_an_abduction_is_not_used_up(tiny_world, abduction):
    first, again = (list(replay(tiny_world, abduction, None)) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_given_noise_is_decoded_as_it_is(tiny_world):
    cold = World(tiny_world.model, replace(tiny_world.decoding, temperature=0.0))
    state = tiny_world.reset(VIDEO[:, :3], ACTIONS[:, :2], SEEDS)
    drawn = tiny_world.step(state[:], ACTIONS[:, 2])[1]
    for given in (drawn.noise, drawn.noise.numpy()):
        output = cold.step(state[:], ACTIONS[:, 2], noise=given)[1]
        assert levels(output.frames, drawn.frames).max() <= 1
        assert torch.equal(output.terminated, drawn.terminated)
    assert torch.equal(drawn.noise, output.noise) or torch.allclose(drawn.noise, output.noise, atol=2e-3)


def test_imagined_frames_begin_an_episode_without_more_noise(tiny_world):
    state = tiny_world.reset(VIDEO[:, :4], ACTIONS[:, :3], SEEDS, noised=True)
    frames = tiny_world.model.codec.frames(tiny_world.model.codec.decode(state.stream.tokens))
    assert levels(frames, torch.from_numpy(VIDEO[:, 3])).max() <= 1


# What is refused


NOISE = np.zeros((3, 6, 192), np.float32)


@pytest.mark.parametrize("tiny_folder", ["frame-parallel"], indirect=True, ids=[""])
@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (NOISE[:, :5], r"noise: expected \(3, 6, 192\) float32, got shape \(3, 5, 192\). Give what abduct"),
        (NOISE[:2], r"noise: expected \(3, 6, 192\) float32, got shape \(2, 6, 192\)"),
        (NOISE[None], r"noise: expected \(3, 6, 192\) float32, got shape \(1, 3, 6, 192\)"),
        (NOISE.astype(np.float64), r"noise: expected \(3, 6, 192\) float32, got float64"),
        (torch.zeros(3, 6, 192).half(), r"noise: expected \(3, 6, 192\) float32, got torch.float16"),
        (NOISE * np.float32("nan"), "noise: expected finite numbers, got NaN or infinity"),
        (NOISE + np.float32("inf"), "noise: expected finite numbers, got NaN or infinity"),
        ("noise", r"noise: expected \(3, 6, 192\) float32, got <U5"),
    ],
)
def test_wrong_noise_is_refused_before_anything_is_changed(noise, message, tiny_folder):
    world = load_world(tiny_folder)
    state = world.reset(VIDEO[:, :2], ACTIONS[:, :1])
    clock = state.clock
    with pytest.raises(ValueError, match=message):
        world.step(state, ACTIONS[:, 1], noise)
    assert state.clock == clock and not state.spent and world.step(state, ACTIONS[:, 1])


@pytest.mark.parametrize("context", [0, FRAMES, -1])
def test_a_context_that_leaves_nothing_is_refused(tiny_world, context):
    with pytest.raises(ValueError, match=f"context: expected 1 to 10 of the 11 frames, got {context}"):
        tiny_world.abduct(VIDEO, ACTIONS, SEEDS, context)


def test_another_worlds_noise_and_wrong_actions_are_refused(abduction, tiny_world, build_world):
    other = load_world(build_world(tiny_world.model.config.flow.kind, seed=9))
    with pytest.raises(ValueError, match="abduction: expected one of the world .*abduct with the one that replays"):
        replay(other, abduction, ACTIONS[:, CONTEXT - 1 :])
    with pytest.raises(ValueError, match=r"actions: expected shape \(3, 9\)"):
        replay(tiny_world, abduction, ACTIONS)
    guided = World(tiny_world.model, replace(tiny_world.decoding, guidance=0.5))
    with pytest.raises(ValueError, match="guidance: expected 0, got 0.5. .*replay without guidance"):
        replay(guided, abduction, ACTIONS[:, CONTEXT - 1 :])
    ahead = World(tiny_world.model, replace(tiny_world.decoding, denoise="lookahead"))
    with pytest.raises(ValueError, match="denoise: expected 'none' or 'causal', got 'lookahead'. .*one step later"):
        replay(ahead, ahead.abduct(VIDEO, ACTIONS, SEEDS, CONTEXT), ACTIONS[:, CONTEXT - 1 :])


# The command


SPACE = spaces.Dict(keys=spaces.MultiBinary(2), mouse=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3))))


def test_actions_are_read_from_json():
    assert parse_action(spaces.Discrete(3), "2") == 2
    action = parse_action(SPACE, '{"keys": [1, 0], "mouse": [[0.5, -1], 2]}')
    assert SPACE.contains(action)
    zeros = {"keys": np.zeros((2, 4, 2), int), "mouse": (np.zeros((2, 4, 2), np.float32), np.zeros((2, 4), int))}
    changed = changed_actions(zeros, [action, action], at=1, hold=2)
    assert changed["keys"][:, :, 0].tolist() == [[0, 1, 1, 0]] * 2 and not zeros["keys"].any()
    assert changed["mouse"][0][0, :, 0].tolist() == [0, 0.5, 0.5, 0] and changed["mouse"][1].sum() == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("left", r"action: expected an action of Discrete\(3\) as JSON, such as 1 or \[0, 1\], got 'left'"),
        ("3", r"action: expected values inside Discrete\(3\)"),
        ("1.5", "action: expected integers"),
        ("null", "action: expected integers"),
        ("[1]", r"action: expected shape \(\)"),
    ],
)
def test_other_actions_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_action(spaces.Discrete(3), text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames: expected at least 1, got 0"),
        ({"hold": 0}, "hold: expected at least 1, got 0"),
        ({"seed": -1}, r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        ({"frames": 5, "change_at": 5}, "change_at: expected one of the 5 frames .*, 0 to 4, got 5"),
    ],
)
def test_impossible_wishes_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        CounterfactualConfig(world="nowhere", data=tmp_path, **changes)


def command(home, **options):
    given = {"world": home / "world", "data": home / "data", "out": home / "out", "frames": 6, "context": 3, "rows": 2}
    pairs = ((f"--{name}", str(value)) for name, value in (given | {"change-at": 2} | options).items())
    main(["counterfactual", *(part for pair in pairs for part in pair)])


def test_the_command_shows_both_branches(home, capsys):
    command(home, hold=3)
    out = capsys.readouterr().out
    assert "same action: 9" in out or "same action: 100.00%" in out
    lines = [line.split() for line in out.splitlines() if line.split() and line.split()[0] in "012345"]
    assert [float(line[-1]) > 0 for line in lines] == [False, False, True, True, True, True]
    assert all(line[4] in "01" for line in lines)
    assert cv2.imread(str(home / "out/counterfactual.png")).shape == (2 * 3 * 16, 6 * 24, 3)
    with av.open(str(home / "out/counterfactual.mp4")) as film:
        assert [frame.width for frame in film.decode(video=0)] == [3 * 24 * 4] * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action": "7"}, "action: expected values inside Discrete"),
        ({"frames": 40}, "frames: expected fewer, context included, than the longest episode has"),
        ({"change-at": 9}, "change_at: expected one of the 6 frames"),
        ({"data": "nowhere"}, "path: expected the folder of a Minari dataset"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(home, options, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        command(home, out=tmp_path / "out", **options)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_action_that_was_taken_anyway_is_refused(home, tmp_path):
    with pytest.raises(ValueError, match="action: expected one that some row did not take"):
        for action in "012":
            counterfactual(
                CounterfactualConfig(
                    str(home / "world"), home / "data", tmp_path, 2, 2, 1, action=action, rows=1, hold=1
                )
            )


def test_a_world_of_other_data_is_refused(home, build_world, tmp_path):
    record(tmp_path / "data", spaces.Discrete(4))
    with pytest.raises(
        ValueError, match=r"data: expected frames \(16, 24, 3\) and actions Discrete\(3\).*Discrete\(4\)"
    ):
        counterfactual(CounterfactualConfig(str(home / "world"), tmp_path / "data", tmp_path / "out"))
    with pytest.raises(ValueError, match="world: expected one that says how its data was split"):
        counterfactual(CounterfactualConfig(str(build_world()), home / "data", tmp_path / "out"))
