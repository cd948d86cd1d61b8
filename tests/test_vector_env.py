"""The batch of worlds: Gymnasium's vector conventions, and rows that know nothing of each other."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tiny import elsewhere

import sfv_world
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.envs.world_env import WorldEnv
from sfv_world.world import World

ROWS = 3


def play(envs, steps, seed=0):
    """Frames, rewards, terminations, truncations and infos of random actions."""
    rng = np.random.default_rng(seed)
    return [envs.step(rng.integers(3, size=envs.num_envs)) for _ in range(steps)]


@pytest.mark.parametrize("mode", list(AutoresetMode)[:2])
def test_rows_are_what_gymnasiums_own_vector_env_makes_of_single_ones(tiny_world, mode):
    def single():
        return gym.wrappers.TimeLimit(WorldEnv(tiny_world), 6)

    expected = SyncVectorEnv([single] * ROWS, autoreset_mode=mode)
    envs = WorldVectorEnv(ROWS, world=tiny_world, max_episode_steps=6, autoreset_mode=mode)
    assert envs.observation_space == expected.observation_space
    assert envs.action_space == expected.action_space
    assert envs.metadata["autoreset_mode"] is mode
    np.testing.assert_array_equal(expected.reset(seed=3)[0], envs.reset(seed=3)[0])
    ends = 0
    for theirs, ours in zip(play(expected, 12), play(envs, 12), strict=True):
        assert np.abs(theirs[0].astype(int) - ours[0]).max() <= 1  # a colour on the edge of its cell may round over it
        np.testing.assert_allclose(ours[1], theirs[1], atol=1e-4)
        np.testing.assert_array_equal(ours[2], theirs[2])
        np.testing.assert_array_equal(ours[3], theirs[3])
        ends += (ours[2] | ours[3]).sum()
        compare_infos(theirs[4], ours[4])
    assert ends > 3


def compare_infos(theirs, ours):
    assert {name for name, mask in theirs.items() if name[0] == "_"} <= ours.keys()
    for name, values in theirs.items():
        if name[0] == "_":
            np.testing.assert_array_equal(ours[name], values)
        elif name == "final_info":
            compare_infos(values, ours[name])
        elif name == "final_obs":
            for mine, frame in zip(ours[name], values, strict=True):
                assert (mine is None) == (frame is None)
                assert frame is None or np.abs(mine.astype(int) - frame).max() <= 1
        elif name not in ("sweeps", "certificate"):
            np.testing.assert_allclose(ours[name], values, rtol=1e-4, atol=1e-4)


def test_make_vec_makes_it(tiny_folder):
    envs = gym.make_vec(
        "sfv_world/World-v0",
        num_envs=3,
        vectorization_mode="vector_entry_point",
        world=str(tiny_folder),
        max_episode_steps=5,
    )
    assert isinstance(envs.unwrapped, WorldVectorEnv)
    frames, _ = envs.reset(seed=0)
    assert frames in envs.observation_space
    frames, rewards, terminated, truncated, info = envs.step(envs.action_space.sample())
    assert frames in envs.observation_space
    assert rewards.shape == terminated.shape == truncated.shape == (3,)
    assert (info["certificate"] < 1e-3).all() and info["guided"].dtype == bool


def test_rows_do_not_depend_on_each_other(tiny_world):
    """The same row among other neighbours, some of which reset in between."""
    one = WorldVectorEnv(1, world=tiny_world)
    many = WorldVectorEnv(ROWS, world=tiny_world, autoreset_mode="Disabled")
    one.reset(seed=[7])
    many.reset(seed=[1, 7, 4])
    for step in range(12):
        a, b = one.step(np.array([1]))[0], many.step(np.array([step % 3, 1, 2]))[0]
        assert np.abs(a[0].astype(int) - b[1]).max() <= 1
        if one._ended[0]:
            break
        if step % 4 == 3 or many._ended.any():
            many.reset(options={"reset_mask": many._ended | np.array([True, False, True])})
    assert step >= 3


def test_the_reset_mask_leaves_other_rows_alone(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world, autoreset_mode="Disabled")
    envs.reset(seed=0)
    before = envs.save_state().rows.frames.numpy()
    mask = np.array([True, False, True])
    frames, _ = envs.reset(seed=[9, None, 9], options={"reset_mask": mask})
    np.testing.assert_array_equal(frames[~mask], before[~mask])
    np.testing.assert_array_equal(frames[0], frames[2])


def test_observed_frames_begin_rows(tiny_world):
    frames = np.random.default_rng(0).integers(256, size=(ROWS, 3, 16, 24, 3), dtype=np.uint8)
    actions = np.random.default_rng(1).integers(3, size=(ROWS, 2))
    envs = WorldVectorEnv(ROWS, world=tiny_world)
    found, _ = envs.reset(seed=0, options={"frames": frames, "actions": actions})
    np.testing.assert_array_equal(found, frames[:, -1])
    single = WorldEnv(tiny_world)
    single.reset(seed=2, options={"frames": frames[2], "actions": actions[2]})
    a, b = single.step(1)[0], envs.step(np.ones(ROWS, int))[0]
    assert np.abs(a.astype(int) - b[2]).max() <= 1


def test_states_are_restored_bit_for_bit(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world, max_episode_steps=4)
    envs.reset(seed=0)
    play(envs, 3)
    state = envs.save_state()
    first = play(envs, 7)  # beyond the end of episodes
    envs.restore_state(state)
    again = play(envs, 7)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[4]["log_likelihood"], b[4]["log_likelihood"])


def test_forks_of_a_row_go_on_alike_beyond_the_ends_of_episodes(tiny_world):
    envs = WorldVectorEnv(1, world=tiny_world, max_episode_steps=2)
    envs.reset(seed=0)
    twice = envs.save_state([0, 0])
    forks = WorldVectorEnv(2, world=tiny_world, max_episode_steps=2)
    forks.restore_state(twice[[1, 0]])
    expected = [np.concatenate([envs.step([0])[0]] * 2) for _ in range(9)]
    for frames in expected:
        assert np.abs(forks.step([0, 0])[0].astype(int) - frames).max() <= 1


def test_a_row_is_forked_into_others_at_another_clock(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world, autoreset_mode="Disabled")
    envs.reset(seed=0)
    row = envs.save_state([1])
    original = envs.step(np.full(ROWS, 2))[0][1]
    envs.reset(options={"reset_mask": np.ones(ROWS, bool)}, seed=5)
    envs._ended[:] = False
    envs.step(np.zeros(ROWS, int))
    envs._ended[:] = False
    envs.restore_state(row[[0, 0]], rows=[0, 2])
    frames = envs.step(np.full(ROWS, 2))[0]
    for index in (0, 2):
        assert np.abs(frames[index].astype(int) - original).max() <= 1


def test_torch_output_stays_on_the_device(tiny_world):
    numpy, tensors = (WorldVectorEnv(ROWS, world=tiny_world, output=kind) for kind in ("numpy", "torch"))
    np.testing.assert_array_equal(numpy.reset(seed=0)[0], tensors.reset(seed=0)[0].numpy())
    for a, b in zip(play(numpy, 4), play(tensors, 4), strict=True):
        assert all(isinstance(value, torch.Tensor) for value in (*b[:4], *b[4].values()))
        for x, y in zip((*a[:4], *a[4].values()), (*b[:4], *b[4].values()), strict=True):
            np.testing.assert_array_equal(x, y.numpy())


FRAMES = np.random.default_rng(0).integers(256, size=(ROWS, 2, 16, 24, 3), dtype=np.uint8)


def given_as(kind, world, actions, step):
    """What rows begin and go on with, if all that is given is of a kind."""
    envs = WorldVectorEnv(ROWS, world=world, output="torch", autoreset_mode="Disabled")
    envs.reset(seed=0)
    mask = kind(np.array([True, False, True]))
    frames = FRAMES if kind is np.ndarray.tolist else kind(FRAMES)
    begun, _ = envs.reset(seed=5, options={"frames": frames, "actions": actions, "reset_mask": mask})
    assert [torch.equal(*pair) for pair in zip(begun, torch.from_numpy(FRAMES[:, -1]), strict=True)] == [1, 0, 1]
    return torch.stack([begun, envs.step(step)[0]]).numpy()


@pytest.mark.parametrize("kind", [np.ndarray.tolist, elsewhere])
def test_lists_and_tensors_are_taken_as_arrays_are(tiny_world, kind):
    actions, step = np.array([[1], [2], [0]]), np.array([2, 0, 1])
    expected = given_as(np.asarray, tiny_world, actions, step)
    np.testing.assert_array_equal(given_as(kind, tiny_world, kind(actions), kind(step)), expected)


def test_composite_actions_of_some_rows(build_world):
    space = spaces.Dict(keys=spaces.MultiBinary(2), mouse=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3))))
    world = sfv_world.load_world(build_world(action_space=space))
    keys, move, click = np.eye(3, 2, dtype=int), np.linspace(-1, 1, 6).reshape(3, 2), np.arange(3)
    step = {"keys": keys, "mouse": (move, click)}
    past = {"keys": keys[:, None], "mouse": (move[:, None], click[:, None])}
    expected = given_as(np.asarray, world, past, step)
    learned = torch.tensor(move, requires_grad=True)
    step = {"keys": elsewhere(keys), "mouse": [learned, click.tolist()]}
    past = {"keys": elsewhere(keys[:, None]), "mouse": [learned[:, None], click[:, None].tolist()]}
    np.testing.assert_array_equal(given_as(elsewhere, world, past, step), expected)
    with pytest.raises(ValueError, match=r"actions: expected a dict with the keys \['keys', 'mouse'\], got \['keys'\]"):
        given_as(np.asarray, world, {"keys": past["keys"]}, step)


def test_memory_is_constant_and_time_does_not_run_out(tiny_world):
    """Many steps of a ring: the cache keeps its place in memory, its size and its precision."""
    envs = WorldVectorEnv(2, world=tiny_world)
    envs.reset(seed=0)
    keys = envs._state.stream.cache.keys
    place, size = keys.data_ptr(), keys.shape
    for infos in (result[4] for result in play(envs, 40)):
        assert (infos["certificate"] < 1e-3).all()
    assert (envs._state.stream.cache.keys.data_ptr(), envs._state.stream.cache.keys.shape) == (place, size)


def test_rows_tell_their_seeds_and_generators_as_gymnasiums_own_do(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world)
    expected = SyncVectorEnv([lambda: WorldEnv(tiny_world)] * ROWS)
    for each in (envs, expected):
        each.reset(seed=5)
    assert envs.np_random_seed == expected.np_random_seed == (5, 6, 7)
    assert [rng.random() for rng in envs.np_random] == [rng.random() for rng in expected.np_random]


def test_a_row_that_ended_elsewhere_begins_anew_in_the_next_step(tiny_world):
    ended = WorldVectorEnv(ROWS, world=tiny_world, max_episode_steps=2)
    ended.reset(seed=0)
    play(ended, 2)
    envs = WorldVectorEnv(ROWS, world=tiny_world, max_episode_steps=2, autoreset_mode="SameStep")
    envs.reset(seed=1)
    envs.restore_state(ended.save_state([1]), rows=[1])
    _, rewards, terminated, truncated, info = play(envs, 1)[0]
    assert not truncated.any() and rewards[1] == 0 and not terminated[1]
    assert info["_log_likelihood"].tolist() == [not terminated[0], False, not terminated[2]]
    assert play(envs, 2)[1][3][1], "the new episode has two steps, as any other"


def test_an_interrupted_step_ends_the_episodes(tiny_world, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    envs = WorldVectorEnv(ROWS, world=tiny_world)
    envs.reset(seed=0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(envs.world, "_next", interrupted)
        play(envs, 1)
    with pytest.raises(ResetNeeded, match=r"Call reset\(\) first"):
        play(envs, 1)
    envs.reset(seed=0)
    play(envs, 1)


def test_seeds_are_integers_of_any_kind(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world)
    expected = envs.reset(seed=[4, 5, 6])[0], envs.step(np.zeros(ROWS, int))[0]
    for seed in (4, np.int64(4), [np.int64(4), 5, np.uint8(6)], np.array([4, 5, 6]), (4, 5, 6)):
        found = envs.reset(seed=seed)[0], envs.step(np.zeros(ROWS, int))[0]
        np.testing.assert_array_equal(found, expected)


SMALL = FRAMES[:, :, :8, :8]
MASK = np.array([True, False, True])


@pytest.mark.parametrize(
    ("seed", "options", "message"),
    [
        ([1], None, r"seed: expected 3 integers from 0, or None, one per row, got \[1\]"),
        (-1, None, r"seed: expected 3 .*, got \[-1, 0, 1\]"),
        ([1, np.int64(-1), None], {"reset_mask": MASK}, "seed: expected 3"),
        ([1, 0.5, 2], None, r"seed: expected 3 .*, got \[1, 0.5, 2\]"),
        (None, {"frame": 1}, "options: expected"),
        (None, {"reset_mask": np.zeros(ROWS, bool)}, "reset_mask: expected"),
        (None, {"frames": SMALL}, "frames: expected .* uint8, got shape"),
        (5, {"frames": SMALL}, "frames: expected .* uint8, got shape"),
        (None, {"frames": SMALL, "reset_mask": MASK}, "frames: expected .* uint8, got shape"),
        ([9, None, None], {"frames": SMALL, "reset_mask": MASK}, "frames: expected .* uint8, got shape"),
        (None, {"frames": FRAMES[:2]}, r"frames: expected those of 3 rows, got shape \(2, 2, 16, 24, 3\)"),
        (None, {"frames": None}, r"frames: expected those of 3 rows, got shape \(\)"),
        (None, {"frames": FRAMES, "actions": [[0], [3], [0]]}, "actions: expected values inside"),
        (None, {"frames": FRAMES, "actions": [[0], [0]], "reset_mask": MASK}, "actions: expected those of 3 rows"),
    ],
)
def test_a_reset_that_fails_changes_nothing(tiny_world, seed, options, message):
    """Neither the episodes that go on, nor those that begin later."""
    envs = WorldVectorEnv(ROWS, world=tiny_world, max_episode_steps=2)
    envs.reset(seed=0)
    start = envs.save_state()
    expected = play(envs, 6)
    envs.restore_state(start)
    with pytest.raises(ValueError, match=message):
        envs.reset(seed=seed, options=options)
    for theirs, ours in zip(expected, play(envs, 6), strict=True):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[4]["log_likelihood"], theirs[4]["log_likelihood"])


def test_rows_without_start_frames_are_reset_by_hand(tiny_world):
    world = World(tiny_world.model)
    for mode in ("NextStep", "SameStep"):
        with pytest.raises(ValueError, match=f"autoreset_mode: expected 'Disabled' .*no start frames.*, got '{mode}'"):
            WorldVectorEnv(ROWS, world=world, autoreset_mode=mode)
    envs = WorldVectorEnv(ROWS, world=world, max_episode_steps=2, autoreset_mode="Disabled")
    envs.reset(seed=0, options={"frames": FRAMES})
    for _ in range(2):
        ended = np.zeros(ROWS, bool)
        while not ended.all():
            terminated, truncated = envs.step(np.zeros(ROWS, int))[2:4]
            ended = terminated | truncated
            if ended.any():
                frames = envs.reset(options={"frames": FRAMES, "reset_mask": ended})[0]
                np.testing.assert_array_equal(frames[ended], FRAMES[ended, -1])


def test_mistakes_are_told_before_anything_changes(tiny_world):
    envs = WorldVectorEnv(ROWS, world=tiny_world, autoreset_mode="Disabled")
    with pytest.raises(ResetNeeded, match="Call reset"):
        envs.step(np.zeros(ROWS, int))
    envs.reset(seed=0)
    state = envs.save_state()
    for actions, message in (
        (np.zeros(ROWS - 1, int), r"actions: expected shape \(3,\)"),
        (np.full(ROWS, 3), "inside"),
    ):
        with pytest.raises(ValueError, match=message):
            envs.step(actions)
    with pytest.raises(ValueError, match=r"actions: expected those of 3 rows, of Discrete\(3\), got None"):
        envs.step(None)
    with pytest.raises(ValueError, match="state: expected a saved state of 3 rows, got 1 rows"):
        envs.restore_state(envs.save_state([0]))
    with pytest.raises(ValueError, match=r"rows: expected each row once, got \[0, 0, 1\]"):
        envs.restore_state(state, rows=[0, 0, 1])
    with pytest.raises(ValueError, match=r"seed: expected 3 integers from 0"):
        envs.reset(seed=1.5)
    frames = envs.step(np.zeros(ROWS, int))[0]
    envs.restore_state(state)
    np.testing.assert_array_equal(envs.step(np.zeros(ROWS, int))[0], frames)
    for name, wrong in (
        ("num_envs", 0),
        ("max_episode_steps", 0),
        ("output", "jax"),
        ("render_mode", "human"),
        ("autoreset_mode", "same_step"),
    ):
        with pytest.raises(ValueError, match=rf"{name}: expected .*, got {wrong!r}"):
            WorldVectorEnv(**{"world": tiny_world, name: wrong})
    other = WorldVectorEnv(ROWS, world=tiny_world)
    with pytest.raises(ResetNeeded, match="restore_state"):
        other.restore_state(state[[0]], rows=[1])
    other.restore_state(state)  # all rows: none need have begun
    np.testing.assert_array_equal(other.step(np.zeros(ROWS, int))[0], frames)
