"""Episodes are split whole, and cut into clips as asked."""

import numpy as np
import pytest
from gymnasium import spaces
from recorded import assert_same

from sfv_world.data.clips import ClipSampler, Episodes


def made(lengths: list[int], *, terminated: bool = True) -> Episodes:
    """Episodes of given numbers of frames; frame contents number the rows, and every last screen is a repeated one."""
    n, ends = sum(lengths), np.cumsum(lengths)
    frames = np.arange(n).astype(np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
    last = np.isin(np.arange(n), ends - 1)
    actions = np.where(last, 0, np.arange(n) % 7 + 1)
    return Episodes(
        frames=frames,
        actions=actions,
        rewards=np.arange(n, dtype=np.float32),
        terminations=last & terminated,
        repeated=last,
        starts=ends - np.array(lengths),
        observation_space=spaces.Box(0, 255, (8, 8, 3), np.uint8),
        action_space=spaces.Discrete(8),
    )


def test_split_divides_whole_episodes() -> None:
    data = made([3, 5, 2, 7, 4, 6, 1, 8, 2, 9])
    train, held_out = data.split(0.3, seed=1)
    assert (len(train), len(held_out)) == (7, 3)
    rows = np.concatenate([train.rewards, held_out.rewards])
    assert sorted(rows) == list(range(len(data.frames))), "every frame is on one side, once"
    for part in (train, held_out):
        for start, end in zip(part.starts, part.ends, strict=True):
            row = int(part.rewards[start])
            assert row in data.starts and part.rewards[start:end].tolist() == list(range(row, row + end - start))
            assert np.array_equal(part.frames[start:end], data.frames[row : row + end - start])
            assert np.array_equal(part.actions[start:end], data.actions[row : row + end - start])
            assert part.repeated[end - 1] and part.terminations[end - 1]
    assert_same(train, data.split(0.3, seed=1)[0])
    assert [len(part) for part in data.split(0.001)] == [9, 1] and [len(part) for part in data.split(0.999)] == [1, 9]
    for mine, theirs in zip(data.split(0.3, 1, 5), made([3, 5, 2, 7, 4]).split(0.3, 1), strict=True):
        assert_same(mine, theirs)  # those after the first five are on no side
    with pytest.raises(ValueError, match="episodes: expected at least 11, the first of which are split, got 10"):
        data.split(0.3, 1, 11)
    for fraction, episodes in ((0.0, data), (1.0, data), (0.5, made([4]))):
        with pytest.raises(ValueError, match="fraction|at least 2"):
            episodes.split(fraction)


@pytest.mark.parametrize("length", [1, 2, 4, 20])
@pytest.mark.parametrize("terminated", [True, False])
def test_clips_are_pieces_of_episodes(length: int, terminated: bool) -> None:
    """Every clip there is, against the definition written out."""
    data = made([3, 1, 6, 2], terminated=terminated)
    every = ClipSampler(data, length, 1).clips(np.arange(len(data.frames)))
    assert every.frames.shape == (12, length, 8, 8, 3) and every.actions.shape == (12, length - 1)
    for start in range(len(data.frames)):
        last = int(data.ends[data.ends > start][0]) - 1
        for t in range(length):
            row, inside = min(start + t, last), start + t <= last
            assert every.frames[start, t, 0, 0, 0] == row
            assert every.valid[start, t] == inside
            assert every.rewards[start, t] == (row if inside else 0)
            assert every.terminations[start, t] == (inside and row == last and terminated)
            assert every.terminal[start, t] == (inside and row == last)
            if t + 1 < length:
                assert every.actions[start, t] == data.actions[min(start + t, last - 1)]  # a real one, if any


def test_batches_are_a_function_of_seed_and_step() -> None:
    data = made([30, 40, 50])
    a, b, other = (ClipSampler(data, 5, 8, seed) for seed in (0, 0, 1))
    steps = [a.batch(step) for step in range(5)]
    for step in (3, 0, 4):
        np.testing.assert_equal(vars(b.batch(step)), vars(steps[step]))
    assert not np.array_equal(steps[0].rewards, steps[1].rewards)
    assert not np.array_equal(steps[0].rewards, other.batch(0).rewards)


def test_ends_are_drawn_as_often_as_middles() -> None:
    """A clip may start anywhere, so each frame is drawn once for every place in a clip it can have."""
    data = made([40, 40])
    sampler = ClipSampler(data, 8, 4000, seed=0)
    every = sampler.clips(np.arange(80))
    drawn = np.bincount(every.rewards[every.valid].astype(int), minlength=80)
    assert (drawn[data.starts] == 1).all() and (drawn[data.ends - 1] == 8).all()
    assert set(drawn[7:40]) == {8}
    starts = np.bincount(sampler.batch(0).rewards[:, 0].astype(int), minlength=80)
    assert starts.min() > 25 and starts.max() < 80, "starts are uniform"


def test_busy_clips_begin_where_something_just_moved() -> None:
    """A flash in frame 7 of the first episode and, weaker, frame 12 of the second: chosen by it, two frames count as padding."""
    data = made([30, 30])
    data.frames[:] = 100
    data.frames[7, 2:4, 2:4], data.frames[42, 2:4, 2:4] = 200, 150
    clips = ClipSampler(data, 4, 4000, seed=0, busy=0.5).batch(0)
    busy = ~clips.valid[:, 0]
    assert not clips.valid[busy, 1].any() and clips.valid[busy, 2].all() and abs(busy.mean() - 0.5) < 0.03
    change = np.abs(clips.frames[busy, 1].astype(int) - clips.frames[busy, 0]).max((1, 2, 3))
    assert set(change) == {100, 50}  # to the flash or back from it
    assert abs((change == 100).mean() - 0.8) < 0.03  # in proportion to the square
    still = ClipSampler(data, 4, 4000, seed=0).batch(0)
    assert np.array_equal(clips.frames[~busy], still.frames[~busy]) and still.valid[:, 0].all()
    with pytest.raises(ValueError, match="busy: expected 0 to 1, got 2"):
        ClipSampler(data, 4, 2, busy=2.0)


def test_sampler_says_what_is_wrong() -> None:
    for name in ("clip_length", "batch_size"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            ClipSampler(made([3]), **{"clip_length": 2, "batch_size": 2, name: 0})
