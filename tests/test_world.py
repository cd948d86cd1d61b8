"""The laws of a world: streaming is scoring, rows are alone, copies are worlds of their own, and damage is refused."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors import SafetensorError
from tiny import normal
from torch import Tensor

from sfv_world import World, load_world
from sfv_world.checkpoint import CONFIG, MODEL, STARTS, load_tensors, save_model, save_tensors
from sfv_world.decoding.frames import read_frame
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.flow.affine import guide
from sfv_world.loading import SHIPPED, find_world
from sfv_world.state import WorldOutput, WorldState

FRAMES = 10  # three windows of the tiny worlds and a bit
ACTIONS = np.random.default_rng(1).integers(0, 3, (4, FRAMES))
VIDEO = np.random.default_rng(0).integers(0, 256, (4, FRAMES, 16, 24, 3), np.uint8)


def decoding(world: World, **changes: Any) -> World:
    return World(world.model, replace(world.decoding, **changes), world.starts)


def rollout(world: World, state: WorldState, actions: np.ndarray) -> tuple[list[WorldOutput], Tensor]:
    """Outputs of every step, and the tokens (b, t, l, c) of the frames in between, that of the beginning first."""
    outputs, tokens = [], [state.stream.tokens]
    for action in actions.T:
        state, output = world.step(state, action)
        outputs.append(output)
        tokens.append(state.stream.tokens)
    return outputs, torch.stack(tokens, dim=1)


def assert_same(a: Any, b: Any) -> None:
    for one, other in zip(a, b, strict=True):
        assert torch.equal(one, other)


# Laws


@pytest.mark.parametrize("context", [1, 2, 7])
def test_observing_frame_by_frame_is_scoring_in_parallel(tiny_world, context):
    seeds = [5, 0, 2**63 - 1, 7]
    score = tiny_world.score(VIDEO, ACTIONS[:, :-1], seeds)
    state = tiny_world.reset(VIDEO[:, :context], ACTIONS[:, : context - 1], seeds)
    for n in range(context, FRAMES):
        state, output = tiny_world.observe(state, ACTIONS[:, n - 1], VIDEO[:, n])
        assert torch.allclose(output.log_likelihood, score.log_likelihood[:, n], rtol=1e-5, atol=1e-3)
        assert torch.allclose(output.bits_per_dim, score.bits_per_dim[:, n], atol=1e-5)
        assert torch.allclose(output.rewards, score.rewards[:, n], atol=1e-5)
        assert torch.allclose(output.termination_probability, score.termination_probability[:, n], atol=1e-5)
        assert torch.equal(output.certificate, torch.zeros(4))


def test_a_frames_score_depends_on_nothing_after_it(tiny_world):
    score = tiny_world.score(VIDEO, ACTIONS[:, :-1])
    begun = tiny_world.score(VIDEO[:, :6], ACTIONS[:, :5])
    for whole, part in zip(score, begun, strict=True):
        assert torch.allclose(whole[:, :6], part, rtol=1e-5, atol=1e-5)


def test_an_outcome_is_told_before_its_frame_is_seen(tiny_world):
    other = VIDEO.copy()
    other[:, -1] = other[:, -2]
    found, expected = (tiny_world.score(video, ACTIONS[:, :-1]) for video in (other, VIDEO))
    assert not torch.allclose(found.log_likelihood[:, -1], expected.log_likelihood[:, -1])
    torch.testing.assert_close(found.termination_probability, expected.termination_probability)
    torch.testing.assert_close(found.rewards, expected.rewards)


def test_a_frame_is_scored_by_its_action_and_its_window(tiny_world):
    actions, video = ACTIONS[:, :-1].copy(), VIDEO.copy()
    actions[:, 4] = (actions[:, 4] + 1) % 3  # leads to frame 5
    video[:, 6] = 255 - video[:, 6]
    before, by_action = tiny_world.score(VIDEO, ACTIONS[:, :-1]), tiny_world.score(VIDEO, actions)
    changed = (before.log_likelihood - by_action.log_likelihood).abs().amax(0) > 1e-3
    assert not changed[:5].any() and changed[5]
    by_frame = tiny_world.score(video, ACTIONS[:, :-1])
    changed = (before.log_likelihood - by_frame.log_likelihood).abs().amin(0) > 1e-3
    assert not changed[:6].any() and changed[6:9].all()


@pytest.mark.parametrize("changes", [{}, {"block": 4, "temperature": 0.5}, {"max_sweeps": 2}])
def test_imagined_frames_have_the_likelihood_of_a_parallel_pass(tiny_world, changes):
    world = decoding(tiny_world, **changes)
    outputs, tokens = rollout(world, world.reset(VIDEO[:, :1], seeds=[1, 2, 3, 4]), ACTIONS[:, :-1])
    vectors = torch.zeros(4, FRAMES, 3)
    vectors[:, 1:] = torch.eye(3)[ACTIONS[:, :-1]]
    reading = world.model(tokens, vectors, torch.arange(FRAMES).expand(4, -1) > 0)
    for n, output in enumerate(outputs, start=1):
        assert torch.allclose(output.log_likelihood, reading.log_likelihood[:, n], rtol=1e-5, atol=1e-3)
        assert torch.allclose(output.noise, reading.encoding.noise[:, n], atol=1e-4)
        assert torch.allclose(output.rewards, world.model.heads.rewards(reading.outcome)[:, n], atol=1e-5)
        assert torch.equal(output.frames, world.model.codec.frames(world.model.codec.decode(tokens[:, n])))


def test_a_row_does_not_depend_on_its_neighbours(tiny_world):
    seeds = [9, 3, 4, 8]
    outputs, tokens = rollout(tiny_world, tiny_world.reset(VIDEO[:, :4], ACTIONS[:, :3], seeds), ACTIONS[:, 3:8])
    for row in (0, 2):
        one = slice(row, row + 1)
        state = tiny_world.reset(VIDEO[one, :4], ACTIONS[one, :3], seeds[one])
        alone, its_tokens = rollout(tiny_world, state, ACTIONS[one, 3:8])
        assert torch.allclose(tokens[one], its_tokens, atol=1e-4)
        for output, single in zip(outputs, alone, strict=True):
            assert torch.equal(output.terminated[one], single.terminated)
            assert (output.frames[one] != single.frames).float().mean() < 0.01  # rounding moves a rare pixel by one
            assert torch.allclose(output.log_likelihood[one], single.log_likelihood, atol=1e-2)


def test_copies_continue_bit_for_bit_and_on_their_own(tiny_world):
    state = tiny_world.reset(VIDEO[:, :4], ACTIONS[:, :3])
    state, _ = tiny_world.step(state, ACTIONS[:, 3])
    copy, swapped = state[:], state[[2, 2, 0]]
    outputs, _ = rollout(tiny_world, state, ACTIONS[:, 4:7])
    again, _ = rollout(tiny_world, copy, ACTIONS[:, 4:7])
    for output, same in zip(outputs, again, strict=True):
        assert_same(output, same)
    chosen, tokens = rollout(tiny_world, swapped, ACTIONS[[2, 2, 0], 4:7])
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5)
    for output, other in zip(outputs, chosen, strict=True):
        assert torch.allclose(output.log_likelihood[[2, 2, 0]], other.log_likelihood, atol=1e-2)


@pytest.mark.parametrize("rows", [1, slice(1, 3), [0, 3], np.array([True, False, False, True]), np.int64(2)])
def test_rows_are_chosen_as_in_numpy(tiny_world, rows):
    state = tiny_world.reset(VIDEO[:, :2], ACTIONS[:, :1], seeds=[4, 5, 6, 7])
    chosen = np.atleast_1d(np.arange(4)[rows])
    assert state[rows].seeds.tolist() == (chosen + 4).tolist()
    assert torch.equal(state[rows].stream.tokens, state.stream.tokens[chosen])
    assert torch.equal(state[rows].frames, torch.from_numpy(VIDEO[chosen, 1]))


def test_a_state_is_used_up_by_a_step_and_only_by_a_step_that_succeeds(tiny_world):
    state = tiny_world.reset(VIDEO[:1, :2], ACTIONS[:1, :1])
    copy = state[:]
    with pytest.raises(ValueError, match="actions: expected values inside"):
        tiny_world.step(state, [3])
    with pytest.raises(ValueError, match="frames: expected"):
        tiny_world.observe(state, [0], VIDEO[:1, 2:3])
    _, output = tiny_world.step(state, [1])
    assert_same(output, tiny_world.step(copy, [1])[1])
    for use in (
        lambda: tiny_world.step(state, [1]),
        lambda: tiny_world.observe(state, [1], VIDEO[:1, 2]),
        lambda: state[:],
    ):
        with pytest.raises(ValueError, match="state: expected one that was not used up, got one that was. Keep a copy"):
            use()


def test_unknown_actions_are_a_condition_of_their_own(tiny_world):
    score = tiny_world.score(VIDEO)
    state = tiny_world.reset(VIDEO[:, :3])
    for n in range(3, FRAMES):
        state, output = tiny_world.observe(state, None, VIDEO[:, n])
        assert torch.allclose(output.log_likelihood, score.log_likelihood[:, n], rtol=1e-5, atol=1e-3)
    tiny_world.step(state, None)
    for action in range(3):
        known = tiny_world.score(VIDEO, np.full((4, FRAMES - 1), action))
        assert ((known.log_likelihood - score.log_likelihood)[:, 1:].abs() > 1e-4).all()


def test_seeds_decide_everything_random(tiny_world):
    state = tiny_world.reset(VIDEO[[0, 0, 0], :2], ACTIONS[[0, 0, 0], :1], seeds=[6, 6, 7])
    outputs, tokens = rollout(tiny_world, state, ACTIONS[[0, 0, 0], 1:4])
    assert torch.allclose(tokens[0], tokens[1], atol=1e-5) and not torch.allclose(tokens[0], tokens[2], atol=0.1)
    noise = torch.stack([output.noise for output in outputs], dim=1)
    frames_apart = (noise[:, 1:] - noise[:, :-1]).flatten(2).std(-1)
    assert (frames_apart > 1.2).all()  # independent of one frame to the next


@pytest.mark.parametrize(
    "changes", [{"draft": "tokens"}, {"draft": "noise"}, {"draft": "zeros"}, {"block": 1}, {"block": 4}], ids=str
)
def test_every_draft_and_block_leads_to_the_same_frame(tiny_world, changes):
    start = tiny_world.reset(VIDEO[:2, :2], ACTIONS[:2, :1])
    expected, _ = rollout(decoding(tiny_world, tolerance=1e-5), start[:], ACTIONS[:2, 1:3])
    outputs, _ = rollout(decoding(tiny_world, **changes), start[:], ACTIONS[:2, 1:3])
    for output, wanted in zip(outputs, expected, strict=True):
        assert (output.certificate <= tiny_world.decoding.tolerance).all()
        assert torch.allclose(output.noise, wanted.noise, atol=2e-3)
        assert torch.allclose(output.log_likelihood, wanted.log_likelihood, atol=0.5)


@pytest.mark.parametrize("kind", ["frame-parallel", "autoregressive"])
def test_what_was_not_solved_is_reported(build_world, kind):
    world = decoding(load_world(build_world(kind)), max_sweeps=1, draft="zeros")
    state = world.reset(VIDEO[:, :2], ACTIONS[:, :1])
    output = world.step(state, ACTIONS[:, 1])[1]
    assert (output.certificate > world.decoding.tolerance).all() and (output.sweeps <= 2).all()


def test_temperature_scales_the_noise(tiny_world):
    start = tiny_world.reset(VIDEO[:, :2], ACTIONS[:, :1])
    noise = {
        temperature: decoding(tiny_world, temperature=temperature).step(start[:], ACTIONS[:, 1])[1].noise
        for temperature in (0.0, 0.5, 1.0)
    }
    assert noise[0.0].abs().max() <= tiny_world.decoding.tolerance
    assert torch.allclose(noise[0.5], 0.5 * noise[1.0], atol=2 * tiny_world.decoding.tolerance)
    assert 0.95 < noise[1.0].std() < 1.05


def test_outputs_agree_with_each_other(tiny_world):
    seeds = np.arange(300)
    _, output = tiny_world.step(tiny_world.start(seeds), np.zeros(300, int))
    assert torch.allclose(output.bits_per_dim, -output.log_likelihood / (16 * 24 * 3 * np.log(2)))
    assert torch.equal(output.reward, output.rewards[torch.arange(300), output.terminated.long()])
    p = output.termination_probability
    assert 0.01 < p.min() and p.max() < 0.5
    assert abs(output.terminated.sum() - p.sum()) < 3 * (p * (1 - p)).sum().sqrt()
    assert output.frames.dtype == torch.uint8 and output.frames.shape == (300, 16, 24, 3)


def test_starts_are_chosen_by_seeds(tiny_world):
    state = tiny_world.start(np.arange(30))
    shown = [[torch.equal(frame, start[-1]) for start in tiny_world.starts["frames"]] for frame in state.frames]
    assert (np.sum(shown, axis=1) == 1).all() and np.all(np.sum(shown, axis=0) > 3)
    one = tiny_world.start([17])
    assert torch.equal(one.frames[0], state.frames[17])
    assert torch.allclose(one.stream.tokens[0], state.stream.tokens[17])
    assert state.ages.tolist() == [4] * 30


def test_rows_put_into_a_state_go_on_as_they_would_have(tiny_world):
    state, output = tiny_world.step(tiny_world.reset(VIDEO, ACTIONS[:, :-1]), ACTIONS[:, -1])
    shown = output.frames.clone()
    fresh = tiny_world.reset(VIDEO[2:, :4], ACTIONS[2:, :3], seeds=[8, 9], clock=state.clock)
    expected, tokens = rollout(
        tiny_world, tiny_world.reset(VIDEO[2:, :4], ACTIONS[2:, :3], seeds=[8, 9]), ACTIONS[2:, :4]
    )
    others, other_tokens = rollout(tiny_world, state[[0, 3]], ACTIONS[[0, 3], :4])
    state.put(np.array([2, 1]), fresh)
    assert torch.equal(output.frames, shown)
    assert torch.equal(state.frames[[0, 2, 1, 3]], torch.stack([shown[0], *fresh.frames, shown[3]]))
    found, found_tokens = rollout(tiny_world, state, ACTIONS[[0, 3, 2, 3], :4])
    assert torch.allclose(found_tokens[[2, 1]], tokens, atol=1e-4)
    assert torch.allclose(found_tokens[[0, 3]], other_tokens, atol=1e-4)
    for output, wanted, other in zip(found, expected, others, strict=True):
        assert torch.allclose(output.log_likelihood[[2, 1]], wanted.log_likelihood, atol=1e-2)
        assert torch.allclose(output.log_likelihood[[0, 3]], other.log_likelihood, atol=1e-2)


def test_rows_are_put_only_where_they_belong(tiny_world, build_world):
    state = tiny_world.start([0, 1, 2])
    ahead = tiny_world.with_decoding(denoise="lookahead")
    for rows, other, message in (
        ([0], load_world(build_world(seed=9)).start([5], state.clock), "state: expected one of the same world"),
        ([0], ahead.start([5], state.clock), "state: expected .* look-ahead"),
        ([0], tiny_world.start([5], state.clock + 1), "state: expected .* clock"),
        ([0, 1], tiny_world.start([5], state.clock), r"rows: expected 1 different ones, .*, got \[0, 1\]"),
        ([1, 1], tiny_world.start([5, 6], state.clock), r"rows: expected 2 different ones, .*, got \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            state.put(np.array(rows), other)
        assert not other.spent and state.seeds.tolist() == [0, 1, 2]


def test_frames_given_are_not_shared(tiny_world):
    given = torch.from_numpy(VIDEO[:, 1].copy())
    state, output = tiny_world.observe(tiny_world.reset(VIDEO[:, :1]), None, given)
    given.zero_()
    assert torch.equal(state.frames, torch.from_numpy(VIDEO[:, 1]))
    assert torch.equal(output.frames, torch.from_numpy(VIDEO[:, 1]))


SPACES = [
    spaces.Discrete(4, start=-1),
    spaces.MultiDiscrete([2, 3]),
    spaces.MultiBinary(3),
    spaces.Box(np.array([-2, -np.inf], np.float32), np.array([3, np.inf], np.float32)),
    spaces.Dict(keys=spaces.MultiBinary(2), mouse=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3)))),
]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_saving_and_loading_is_the_identity(build_world, tmp_path, space):
    folder = build_world("autoregressive", action_space=space)
    world = load_world(folder)
    save_model(tmp_path / "copy", world.model, world.about)
    shutil.copy(folder / STARTS, tmp_path / "copy")
    other = load_world(str(tmp_path / "copy"), decoding=DecodingConfig(tolerance=1e-2))
    assert other.decoding.tolerance == 1e-2 and other.name == "copy"
    assert other.action_space == world.action_space == space
    assert other.about == world.about == {"data": {"fps": 8.75}}
    for name, tensor in load_tensors(folder / MODEL)[0].items():
        assert torch.equal(tensor, other.model.state_dict()[name]), name
    assert_same(world.starts.values(), other.starts.values())
    assert_same(world.score(VIDEO), other.score(VIDEO))


# What is refused


@pytest.mark.parametrize("tiny_folder", ["frame-parallel"], indirect=True, ids=[""])
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: w.reset(VIDEO[0]),
            r"frames: expected \(B, K, 16, 24, 3\) uint8, at least one of each, got shape \(10, 16, 24, 3\)",
        ),
        (lambda w: w.reset(VIDEO[..., :8, :]), r"frames: expected .*, got shape \(4, 10, 16, 8, 3\)"),
        (lambda w: w.reset(VIDEO[:, :0]), r"frames: expected .*, got shape \(4, 0, 16, 24, 3\)"),
        (lambda w: w.reset(VIDEO[:0]), r"frames: expected .*, got shape \(0, 10, 16, 24, 3\)"),
        (lambda w: w.reset(VIDEO / 255), "frames: expected .* uint8, got float64. Give colours from 0 to 255"),
        (lambda w: w.reset(VIDEO * np.float32(np.nan)), "frames: expected .* uint8, got float32"),
        (lambda w: w.score(torch.from_numpy(VIDEO).long()), "frames: expected .* uint8, got torch.int64"),
        (lambda w: w.score(None), "frames: expected .* uint8, got object"),
        (lambda w: w.reset(VIDEO, ACTIONS), r"actions: expected shape \(4, 9\) for Discrete\(3\), got \(4, 10\)"),
        (lambda w: w.reset(VIDEO[:, :1], ACTIONS[:, :1]), r"actions: expected shape \(4, 0\) .*, got \(4, 1\)"),
        (lambda w: w.score(VIDEO, ACTIONS[:, :-1] + 1), r"actions: expected values inside Discrete\(3\), .* 1 to 3"),
        (lambda w: w.score(VIDEO, ACTIONS[:, :-1] * 1.0), "actions: expected integers .*, got dtype float64"),
        (lambda w: w.score(VIDEO, seeds=[0, 1, 2]), r"seeds: expected 4 integers from 0 to .*, got \[0, 1, 2\]"),
        (lambda w: w.score(VIDEO, seeds=[0, 1, 2, -1]), r"seeds: expected 4 integers from 0 .*, got \[0, 1, 2, -1\]"),
        (lambda w: w.score(VIDEO, seeds=[0, 1, 2, 2**63]), r"seeds: expected 4 integers .*, got \[0, 1, 2, 9223"),
        (lambda w: w.score(VIDEO, seeds=[0, 1, 2, 0.5]), r"seeds: expected 4 integers .*, got \[0, 1, 2, 0.5\]"),
        (lambda w: w.start([-1]), r"seeds: expected 1 integers .*, got \[-1\]"),
        (lambda w: w.step(w.start([1]), [3]), r"actions: expected values inside Discrete\(3\), got .* from 3 to 3"),
        (lambda w: w.step(w.start([1]), [0, 0]), r"actions: expected shape \(1,\) for Discrete\(3\), got \(2,\)"),
        (lambda w: w.observe(w.start([1]), [0], VIDEO[:2, 0]), "frames: expected 1 rows as the state has, got 2"),
        (lambda w: World(w.model).start([0]), "world: expected start frames in .*, found none. Pass frames to reset"),
        (lambda w: DecodingConfig(tolerance=0.0), "tolerance: expected a positive number, got 0"),
        (lambda w: DecodingConfig(block=0), "block: expected None or at least 1, a whole number, got 0"),
        (lambda w: DecodingConfig(max_sweeps=0), "max_sweeps: expected None or at least 1, a whole number, got 0"),
        (lambda w: DecodingConfig(temperature=-1.0), "temperature: expected at least 0, got -1"),
        (lambda w: load_world("nowhere"), r"world: expected a folder or one of \[.*\], got 'nowhere'"),
    ],
)
def test_mistakes_are_told(tiny_world, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny_world)


def edited(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Damages a world's configuration."""

    def damage(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        change(config)
        (folder / CONFIG).write_text(json.dumps(config))

    return damage


def retensored(name: str, change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Damages the tensors of one of a world's files."""

    def damage(folder: Path) -> None:
        tensors, _ = load_tensors(folder / name)
        change(tensors)
        save_tensors(folder / name, tensors)

    return damage


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / CONFIG).unlink(), "expected a world's folder, .*; found no config.json"),
        (lambda f: (f / MODEL).unlink(), "model.safetensors: expected a safetensors file, found none"),
        (cut(MODEL), "model.safetensors: expected a complete safetensors file, got one that cannot be read"),
        (cut(STARTS), "starts.safetensors: expected a complete safetensors file, got one that cannot be read"),
        (lambda f: (f / MODEL).write_bytes(b""), "model.safetensors: expected a complete safetensors file"),
        (lambda f: torch.save({"a": torch.zeros(9)}, f / MODEL), "expected a complete .* pickled checkpoints are"),
        (cut(CONFIG), "config.json: expected a world's configuration, got one that cannot be read"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\x00"), "config.json: expected a world's configuration"),
        (edited(lambda c: c.update(format=2)), "config.json: expected a world of format 3, got 2"),
        (edited(lambda c: c.pop("format")), "config.json: expected a world of format 3, got None"),
        (lambda f: (f / CONFIG).write_text("[]"), "config.json: expected a world of format 3, got 'list'"),
        (edited(lambda c: c.pop("model")), "config.json: expected a world's configuration, .*model"),
        (edited(lambda c: c["model"]["flow"].update(kind="other")), "(?s)config.json: expected a world's .*kind"),
        (edited(lambda c: c["model"]["flow"].update(channels=3)), "(?s)config.json: expected a world's .*channels"),
        (edited(lambda c: c["action_space"].update(type="Other")), "config.json: expected a world's configuration"),
        (edited(lambda c: c.update(action_space=None)), "config.json: expected a world's configuration"),
        (edited(lambda c: c["action_space"].update(n=4)), r"do not fit config.json \(controls.*expected \(8, 4\), got"),
        (edited(lambda c: c["model"]["flow"]["deep"].update(width=64)), "tensors do not fit config.json"),
        (retensored(MODEL, lambda t: t.popitem()), r"1 tensors do not fit config.json \(.*, got None\)"),
        (retensored(MODEL, lambda t: t.update(more=torch.zeros(1))), "1 tensors .*more: expected None"),
        (retensored(STARTS, lambda t: t.pop("actions")), r"starts.safetensors: expected .*actions.*, got .*frames"),
        (retensored(STARTS, lambda t: t.update(frames=t["frames"][:, :, :8])), "starts.safetensors: expected .*, got"),
        (retensored(STARTS, lambda t: t.update(frames=t["frames"][:1])), "starts.safetensors: expected .*, got"),
    ],
)
def test_a_damaged_world_is_refused(build_world, tmp_path, damage, message):
    folder = Path(shutil.copytree(build_world(), tmp_path / "world"))
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_world(folder)


def test_a_compiled_world_is_the_same_to_rounding(build_world):
    script = """
import sys, torch
from dataclasses import replace
from sfv_world import load_world
plain, fused = load_world(sys.argv[1]), load_world(sys.argv[1]).compiled()
for world in (plain, fused):
    world.decoding = replace(world.decoding, denoise="causal")
expected, found = (world.step(world.start([3, 4]), [0, 1])[1] for world in (plain, fused))
assert (expected.frames.int() - found.frames.int()).abs().max() <= 1
torch.testing.assert_close(expected.log_likelihood, found.log_likelihood, rtol=1e-5, atol=1e-3)
assert (found.certificate <= 1e-3).all() and torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2
import copy, pickle
for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):  # weights of their own, compiled anew when asked
    assert "decode" not in vars(other.model.flow.shallow)
    torch.nn.init.zeros_(other.model.flow.shallow.blocks[0].proj_out.weight)
    changed = other.step(other.start([3, 4]), [0, 1])[1]
    assert not torch.equal(changed.frames, expected.frames)
again = fused.step(fused.start([3, 4]), [0, 1])[1]
assert torch.equal(again.frames, found.frames)
"""  # in a process of its own: torch.compile cannot see through the shape checks of these tests
    subprocess.run([sys.executable, "-c", script, build_world("bands")], check=True)
    with pytest.raises(ValueError, match=r"compiled: expected a world whose shallow flow goes in bands"):
        load_world(build_world("autoregressive")).compiled()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("denoise", ["none", "lookahead"])
def test_a_state_is_saved_to_a_file_and_goes_on_bit_for_bit(
    tiny_world: World, build_world, tmp_path: Path, denoise, steps
) -> None:
    world = tiny_world.with_decoding(denoise=denoise)
    state = world.start([3, 4])
    for _ in range(steps):
        state, _ = world.step(state, [0, 1])
    world.save_state(state, tmp_path / "state.safetensors")
    again = world.load_state(tmp_path / "state.safetensors")
    for _ in range(4):
        state, expected = world.step(state, [2, 1])
        again, found = world.step(again, [2, 1])
        assert torch.equal(expected.frames, found.frames)
        assert torch.equal(expected.log_likelihood, found.log_likelihood)
    other = load_world(build_world(seed=9))
    with pytest.raises(ValueError, match=r"expected a state of the world.*Load it into the world it was saved from"):
        other.load_state(tmp_path / "state.safetensors")


@pytest.mark.parametrize("kind", ["frame-parallel", "bands", "autoregressive"])
def test_guidance_moves_a_frame_away_from_what_needs_no_action(build_world, kind):
    """By the formula of guided normals; the likelihood, and what follows, stay those of the unguided model."""
    plain, guided = (decoding(load_world(build_world(kind)), guidance=weight) for weight in (0.0, 2.0))
    state = plain.reset(VIDEO[:, :2], ACTIONS[:, :1])
    ours, theirs = plain.step(state[:], ACTIONS[:, 1])[1], plain.step(state[:], None)[1]
    after, output = guided.step(state[:], ACTIONS[:, 1])
    assert output.guided.all() and not ours.guided.any() and (output.sweeps % 2 == 0).all()
    assert (output.certificate < 1e-3).all()
    assert (output.noise - ours.noise).abs().amax() > 0.01
    # The frame is less likely without its action, as far as it was moved: its own ratio of densities grows.
    tokens = after.stream.tokens
    with_action, without = (
        read_frame(plain.model.flow, state[:].stream, tokens, controls).log_prob.sum(-1)
        for controls in (plain.model.controls(*plain._actions(state, known)) for known in (ACTIONS[:, 1], None))
    )
    assert torch.allclose(with_action + plain.model.codec.log_det, output.log_likelihood, rtol=1e-4, atol=0.5)
    unmoved = plain.step(state[:], ACTIONS[:, 1])[0].stream.tokens
    before = [
        read_frame(plain.model.flow, state[:].stream, unmoved, controls).log_prob.sum(-1)
        for controls in (plain.model.controls(*plain._actions(state, known)) for known in (ACTIONS[:, 1], None))
    ]
    assert ((with_action - without) > (before[0] - before[1])).float().mean() > 0.5
    assert not torch.equal(theirs.frames, ours.frames)


@pytest.mark.parametrize("solver", [{"block": 1}, {"block": None}, {"block": 2}, {"max_sweeps": 1}])
def test_guided_sweeps_find_what_the_guided_fields_map_to_the_noise(build_world, solver):
    """In blocks or token by token, each row alone or with others; a sweep limit is told of by the certificate."""
    world = load_world(build_world("autoregressive")).with_decoding(guidance=2.0, **solver)
    state, actions, z = world.reset(VIDEO[:, :2], ACTIONS[:, :1]), ACTIONS[:, 1], normal(len(VIDEO), 6, 192)
    after, output = world.step(state[:], actions, z)
    tokens, flow, fields = after.stream.tokens, world.model.flow, []
    for known in (actions, None):
        stream = state[:].stream
        controls = world.model.controls(*world._actions(state, known))
        read_frame(flow, stream, tokens, controls)
        fields.append(stream.stages[0].fields)
    drawn = guide(*fields, 2.0).normalise(stream.stages[0].tokens)[0]
    error = (drawn - z).abs().amax((1, 2))
    torch.testing.assert_close(output.certificate, error, rtol=1e-3, atol=2e-5)
    assert (error > 1e-3).all() if "max_sweeps" in solver else (error < 1e-3).all()
    for row in range(len(state)):
        alone, one = world.step(state[[row]], actions[[row]], z[[row]])
        torch.testing.assert_close(alone.stream.tokens, tokens[[row]], rtol=0, atol=1e-4)
        assert one.sweeps == output.sweeps[row]


def test_a_state_is_of_one_world_alone(build_world, tmp_path):
    one, other = load_world(build_world()), load_world(build_world(seed=1))
    state = one.start([0, 1])
    for verb in (
        lambda: other.step(state, [0, 0]),
        lambda: other.observe(state, [0, 0], VIDEO[:2, 0]),
        lambda: other.save_state(state, tmp_path / "state"),
    ):
        with pytest.raises(
            ValueError, match=r"state: expected one of .*, got one of another world.* Use it with the world"
        ):
            verb()
    assert not (tmp_path / "state").exists()
    assert not state.spent and len(repr(state)) < 100 and "2 rows" in repr(state) and "Discrete" in repr(one)
    with pytest.raises(ValueError, match="state: expected at least one row, got none"):
        one.step(state[[]], [])
    with pytest.raises(ValueError, match="seeds: expected .* at least one row, got none"):
        one.start([])


def test_files_are_as_readable_as_any_others(build_world, tmp_path):
    world = load_world(build_world())
    world.save_state(world.start([0]), tmp_path / "state")
    (tmp_path / "other").touch()
    assert (tmp_path / "state").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_file_that_cannot_be_written_is_told(build_world, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device")

    world = load_world(build_world())
    monkeypatch.setattr("sfv_world.checkpoint.save_file", full)
    with pytest.raises(OSError, match="state: could not be written .No space left on device"):
        world.save_state(world.start([0]), tmp_path / "state")
    assert not any(tmp_path.iterdir())


def test_a_world_can_decode_otherwise(build_world):
    world = load_world(build_world())
    calm = world.with_decoding(temperature=0.0)
    assert (world.decoding.temperature, calm.decoding.temperature, calm.checksum) == (1.0, 0.0, world.checksum)
    one, other = (calm.step(world.start([seed]), [0])[1].frames for seed in (0, 0))
    assert torch.equal(one, other)


def test_worlds_are_float32_whatever_torchs_default(build_world):
    folder = build_world()
    expected = load_world(folder).score(VIDEO, ACTIONS[:, :-1])
    torch.set_default_dtype(torch.float64)
    try:
        world = load_world(folder)
        found, (_, output) = world.score(VIDEO, ACTIONS[:, :-1]), world.step(world.start([0]), [0])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.log_likelihood, expected.log_likelihood) and output.log_likelihood.dtype == torch.float32


def test_a_folder_of_another_kind_hides_no_shipped_world(tmp_path, monkeypatch, build_world):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doom-basic").mkdir()
    assert find_world("doom-basic").samefile(SHIPPED / "doom-basic")
    shutil.copytree(build_world(), tmp_path / "doom-takecover")
    assert find_world("doom-takecover").samefile(tmp_path / "doom-takecover")


def test_what_a_world_cannot_do_is_told_before_a_step(build_world):
    able = load_world(build_world())
    world, state = decoding(able, draft="learned"), able.reset(VIDEO[:, :2], ACTIONS[:, :1])
    for verb in (lambda: world.reset(VIDEO[:, :2], ACTIONS[:, :1]), lambda: world.step(state, ACTIONS[:, 1])):
        with pytest.raises(ValueError, match=r"draft: expected .* for a flow without a draft network, got 'learned'"):
            verb()
    assert not state.spent
    with pytest.raises(ValueError, match=r"guidance: expected at least 0, got -1"):
        decoding(world, guidance=-1.0)
