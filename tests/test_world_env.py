"""The contracts of the environment: Gymnasium's, Stable-Baselines3's, and its own promises."""

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_checker import check_env as check_env_for_sb3
from tiny import elsewhere

import sfv_world
from sfv_world.envs.world_env import WorldEnv

FRAMES = np.random.default_rng(0).integers(0, 256, (5, 16, 24, 3), np.uint8)
OBSERVED = {"frames": FRAMES, "actions": [0, 2, 1, 0]}
INFO = {"log_likelihood", "bits_per_dim", "sweeps", "certificate", "guided", "termination_probability", "frames_behind"}

ONE_KIND = pytest.mark.parametrize("tiny_folder", ["frame-parallel"], indirect=True, ids=[""])
"""For what does not depend on the kind of deep flow."""


@pytest.fixture
def env(tiny_world: sfv_world.World) -> WorldEnv:
    return WorldEnv(tiny_world)


def play(env: gym.Env, actions: Any) -> list[Any]:
    """Results of steps, up to the end of the episode."""
    results: list[Any] = []
    for action in actions:
        results.append(env.step(action))
        if results[-1][2]:
            break
    return results


def assert_same(a: Any, b: Any) -> None:
    """Compares trees of arrays and numbers bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, tuple | list):
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    else:
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


# Contracts


def test_gymnasium_accepts_it(tiny_folder, windows):
    check_env(gym.make("sfv_world/World-v0", world=str(tiny_folder), render_mode="rgb_array").unwrapped)
    assert not windows


@pytest.mark.filterwarnings("ignore:The minimal resolution for an image is 36x36")
def test_stable_baselines_accepts_it(env):
    check_env_for_sb3(env)


def test_composite_actions(build_world):
    space = spaces.Dict(
        keys=spaces.MultiBinary(2),
        mouse=spaces.Tuple((spaces.Box(-1, 1, (2,)), spaces.Discrete(3, start=1))),
    )
    env = gym.make("sfv_world/World-v0", world=str(build_world(action_space=space))).unwrapped
    check_env(env, skip_render_check=True)
    actions = spaces.Dict(
        keys=spaces.MultiBinary((4, 2)),
        mouse=spaces.Tuple((spaces.Box(-1, 1, (4, 2)), spaces.MultiDiscrete([3] * 4, start=[1] * 4))),
    ).sample()
    env.reset(options={"frames": FRAMES, "actions": actions})
    env.reset(options={"frames": FRAMES[:1], "actions": ()})
    env.reset(options={"frames": FRAMES})
    good = env.action_space.sample()
    for bad, message in (
        ({"keys": good["keys"]}, r"action: expected a dict with the keys \['keys', 'mouse'\], got \['keys'\]"),
        ({**good, "keys": [0, 2]}, r"action\['keys'\]: expected values inside"),
        ({**good, "mouse": good["mouse"][:1]}, r"action\['mouse'\]: expected a tuple of 2 parts"),
        ({**good, "mouse": (np.full(2, np.nan), 1)}, r"action\['mouse'\]\[0\]: expected finite numbers, got NaN"),
        (0, "action: expected a dict with the keys .*, got int"),
        (None, "action: expected a dict .*, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            env.step(bad)
    env.step(good)


@ONE_KIND
def test_a_spec_is_a_recipe_in_plain_text(tiny_folder):
    env = gym.make("sfv_world/World-v0", world=str(tiny_folder), temperature=0.7, block=4, max_episode_steps=3)
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    assert again.unwrapped.world.decoding == env.unwrapped.world.decoding
    assert (env.unwrapped.world.decoding.temperature, env.unwrapped.world.decoding.block) == (0.7, 4)
    assert_same(env.reset(seed=3), again.reset(seed=3))
    assert_same(play(env, [0, 1, 2]), play(again, [0, 1, 2]))


@ONE_KIND
def test_time_limits_truncate(tiny_world):
    env = gym.make("sfv_world/World-v0", world=tiny_world, max_episode_steps=2)
    assert isinstance(env, TimeLimit) and env.spec.max_episode_steps == 2
    env.reset(seed=1)
    assert [result[2:4] for result in play(env, [0, 0])] == [(False, False), (False, True)]


@ONE_KIND
def test_many_environments_share_a_world(tiny_world):
    envs = gym.make_vec("sfv_world/World-v0", num_envs=2, vectorization_mode="sync", world=tiny_world)
    observations, _ = envs.reset(seed=5)
    alone = WorldEnv(tiny_world)
    assert np.array_equal(observations[1], alone.reset(seed=6)[0])
    observations, *_ = envs.step(np.array([0, 2]))
    assert np.array_equal(observations[1], alone.step(2)[0])


# What it returns


def test_it_shows_what_the_world_imagines(env, tiny_world):
    frame, info = env.reset(seed=4, options=OBSERVED)
    assert np.array_equal(frame, FRAMES[-1]) and info == {}
    seed = np.random.default_rng(4).integers(2**63)
    state = tiny_world.reset(FRAMES[None], [OBSERVED["actions"]], [seed])
    for action in (1, 2):
        frame, reward, terminated, truncated, info = env.step(action)
        state, output = tiny_world.step(state, [action])
        assert np.array_equal(frame, output.frames[0].numpy()) and frame.dtype == np.uint8
        assert type(reward) is float and reward == output.reward.item()
        assert type(terminated) is bool and terminated == output.terminated.item()
        assert truncated is False
        assert info == {name: getattr(output, name).item() for name in INFO}
        assert {type(value) for value in info.values()} == {float, int, bool} and type(info["sweeps"]) is int


def test_it_begins_at_start_frames_of_the_world(env, tiny_world):
    begun = {env.reset(seed=seed)[0].tobytes() for seed in range(20)}
    assert begun == {frames[-1].numpy().tobytes() for frames in tiny_world.starts["frames"]}


@ONE_KIND
def test_it_describes_itself(env, tiny_world):
    assert env.observation_space == spaces.Box(0, 255, (16, 24, 3), np.uint8)
    assert env.action_space == spaces.Discrete(3)
    assert env.metadata["render_fps"] == 9 and WorldEnv.metadata["render_fps"] == 10
    assert WorldEnv(sfv_world.World(tiny_world.model)).metadata["render_fps"] == 10


def test_episodes_are_functions_of_their_seeds(env):
    def episodes() -> list[Any]:
        first = env.reset(seed=11), play(env, [0, 1, 2, 0])
        return [*first, env.reset(), play(env, [0, 1, 2, 0]), env.reset(options=OBSERVED), play(env, [0, 1])]

    once, twice = episodes(), episodes()
    assert_same(once, twice)
    assert not np.array_equal(once[1][0][0], once[3][0][0])
    env.reset(seed=12, options=OBSERVED)
    assert not np.array_equal(env.step(0)[0], once[5][0][0])


@ONE_KIND
def test_actions_matter(env):
    env.reset(seed=0)
    start = env.save_state()
    frames = set()
    for action in range(3):
        env.restore_state(start)
        frames.add(env.step(action)[0].tobytes())
    assert len(frames) == 3


def test_what_was_returned_is_the_callers_own(env):
    observed = {"frames": FRAMES.copy(), "actions": np.array(OBSERVED["actions"])}
    env.render_mode = "rgb_array"
    env.reset(seed=4, options=observed)
    expected = play(env, [1, 2, 0])
    frame, _ = env.reset(seed=4, options=observed)
    frame[:], observed["frames"][:], observed["actions"][:] = 0, 0, 0
    for action, result in zip([1, 2, 0], expected, strict=False):
        found = env.step(action)
        assert_same(found, result)
        assert np.array_equal(env.render(), result[0])
        env.render()[:] = 0
        assert np.array_equal(env.render(), result[0])
        found[0][:], found[4]["sweeps"] = 0, -1


@ONE_KIND
def test_tensors_are_taken_as_arrays_are(env):
    expected = env.reset(seed=4, options=OBSERVED), env.step(1)
    observed = {name: elsewhere(values) for name, values in OBSERVED.items()}
    assert_same((env.reset(seed=4, options=observed), env.step(elsewhere(1))), expected)


# States


def test_saved_states_continue_bit_for_bit_and_often(env):
    env.reset(seed=2)
    env.step(1)
    saved = env.save_state()
    first = play(env, [0, 1, 2])
    for action in (2, 2):
        env.restore_state(saved)
        play(env, [action])
    env.restore_state(saved)
    assert_same(play(env, [0, 1, 2]), first)
    env.reset(seed=99)
    env.restore_state(pickle.loads(pickle.dumps(saved)))
    assert_same(play(env, [0, 1, 2]), first)


def test_saved_states_know_whether_the_episode_ended(env, tiny_world):
    ended = until_terminated(env)
    final = env.save_state()
    env.reset(seed=0)
    env.restore_state(final)
    with pytest.raises(ResetNeeded):
        env.step(0)
    other = WorldEnv(tiny_world, render_mode="rgb_array", tolerance=0.01)
    other.restore_state(final)
    assert np.array_equal(other.render(), ended)


@ONE_KIND
def test_what_is_made_in_inference_mode_goes_on_outside(env):
    env.reset(seed=0)
    expected = [env.step(1), env.step(2)]
    with torch.inference_mode():
        env.reset(seed=0)
        saved = env.save_state()
        found = [env.step(1)]
    assert_same(found[0], expected[0])
    assert_same(env.step(2), expected[1])
    env.restore_state(saved)
    assert_same(env.step(1), expected[0])


@ONE_KIND
def test_states_of_other_worlds_are_refused(env, build_world):
    other = WorldEnv(build_world(seed=1))
    other.reset(seed=0)
    env.reset(seed=0)
    untouched = env.save_state()
    for state, message in (
        (other.save_state(), r"state: expected one of .* on cpu \(checksum \d+\), got one of another world"),
        (untouched.row, "state: expected what save_state returned, got WorldState"),
        (None, "state: expected what save_state returned, got NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            env.restore_state(state)
    expected = env.step(0)
    env.restore_state(untouched)
    assert_same(env.step(0), expected)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
def test_environments_are_copied_as_they_stand(env, clone: Callable[[WorldEnv], WorldEnv]):
    env.reset(seed=2)
    env.step(1)
    other = clone(env)
    assert_same(play(other, [0, 1, 2]), play(env, [0, 1, 2]))
    assert_same(other.reset(), env.reset())
    other.restore_state(env.save_state())


# Mistakes


def until_terminated(env: WorldEnv) -> np.ndarray:
    """Plays until an episode has terminated and returns its last frame."""
    env.reset(seed=7)
    for _ in range(200):
        frame, _, terminated, _, _ = env.step(0)
        if terminated:
            return frame
    raise AssertionError("the tiny world ends about one in twenty frames")


def test_nothing_steps_outside_an_episode(env):
    env.render_mode = "rgb_array"
    for call in (lambda: env.step(0), env.render, env.save_state):
        with pytest.raises(ResetNeeded, match=r"expected an episode that has begun, got none. Call reset\(\) first"):
            call()
    until_terminated(env)
    with pytest.raises(ResetNeeded, match=r"step: expected an episode that goes on, got one that has ended"):
        env.step(0)
    env.reset()
    env.step(0)


@ONE_KIND
def test_an_interrupted_step_ends_the_episode(env, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    env.reset(seed=3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(env.world, "_next", interrupted)
        env.step(1)
    with pytest.raises(ResetNeeded, match=r"Call reset\(\) first"):
        env.step(1)
    env.reset(seed=3)
    env.step(1)


@ONE_KIND
def test_gymnasium_forks_it_into_processes(tiny_folder):
    script = (
        "import sys, gymnasium, torch, sfv_world; torch.set_num_threads(2); torch.randn(999, 999).exp()\n"
        "envs = gymnasium.make_vec('sfv_world/World-v0', num_envs=2, world=sys.argv[1], vectorization_mode='async')\n"
        "envs.reset(seed=0); print(envs.step(envs.action_space.sample())[0].shape); envs.close()"
    )
    done = subprocess.run([sys.executable, "-c", script, tiny_folder], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 16, 24, 3)"


@ONE_KIND
@pytest.mark.parametrize("action", [3, -1, 0.5, None, [0], [[0], [1, 2]], "left"])
def test_a_bad_action_changes_nothing(env, action):
    env.reset(seed=3)
    saved = env.save_state()
    with pytest.raises(ValueError, match="action: expected"):
        env.step(action)
    found = env.step(1)
    env.restore_state(saved)
    assert_same(env.step(1), found)


@ONE_KIND
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"actions": [0]}, r"options: expected .* got \['actions'\]"),
        ({**OBSERVED, "seed": 1}, r"options: expected .* got \['frames', 'actions', 'seed'\]"),
        ({"frames": FRAMES, "actions": [0]}, r"actions: expected shape \(4,\) for Discrete\(3\), got \(1,\)"),
        ({"frames": FRAMES, "actions": []}, r"actions: expected shape \(4,\) .*, got \(0,\)"),
        ({"frames": FRAMES[:1], "actions": [0]}, r"actions: expected shape \(0,\) .*, got \(1,\)"),
        ({"frames": FRAMES, "actions": [0, 1, 2, 3]}, r"actions: expected values inside Discrete\(3\)"),
        (
            {"frames": FRAMES[0], "actions": []},
            r"frames: expected \(K, 16, 24, 3\) uint8, at least one of each, got shape \(16",
        ),
        ({"frames": FRAMES[:, :8], "actions": [0] * 4}, r"frames: expected .*, got shape \(5, 8, 24, 3\)"),
        ({"frames": FRAMES / 255, "actions": [0] * 4}, "frames: expected .* uint8, got float64"),
        ({"frames": None, "actions": []}, "frames: expected .* uint8, got object"),
    ],
)
def test_bad_options_leave_the_episode_and_later_ones_as_they_are(env, options, message):
    env.reset(seed=3)
    saved, later = env.save_state(), copy.deepcopy(env.unwrapped.np_random).integers(2**63)
    for seed in (None, 4):
        with pytest.raises(ValueError, match=message):
            env.reset(seed=seed, options=options)
    found = env.step(1)
    env.restore_state(saved)
    assert_same(env.step(1), found)
    assert env.unwrapped.np_random.integers(2**63) == later


@ONE_KIND
def test_one_observed_frame_is_enough(env):
    frame, _ = env.reset(seed=0, options={"frames": FRAMES[:1], "actions": []})
    assert np.array_equal(frame, FRAMES[0])
    env.step(0)


@ONE_KIND
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"render_mode": "ansi"}, "render_mode: expected None, 'human' or 'rgb_array', got 'ansi'"),
        ({"device": "meta"}, "device: expected cpu, where the world is, got meta"),
        ({"device": "cpu:1"}, "device: expected cpu, where the world is, got cpu:1"),
        ({"device": "somewhere"}, "device: expected cpu, where the world is, got somewhere"),
        ({"temperature": float("inf")}, "temperature: expected at least 0, got inf"),
        ({"temperature": -1.0}, "temperature: expected at least 0, got -1"),
        ({"max_sweeps": 0}, "max_sweeps: expected None or at least 1, a whole number, got 0"),
    ],
)
def test_bad_arguments_are_told(tiny_world, kwargs, message):
    with pytest.raises(ValueError, match=message):
        WorldEnv(tiny_world, **kwargs)


@ONE_KIND
def test_the_device_where_the_world_is_may_be_named(tiny_world):
    for device in (None, "cpu", "cpu:0", torch.device("cpu")):
        assert WorldEnv(tiny_world, device=device).world.device == torch.device("cpu")


@ONE_KIND
def test_unknown_names_are_told(tiny_world):
    with pytest.raises(ValueError, match=r"world: expected a folder or one of \[.*\], got 'nowhere'"):
        gym.make("sfv_world/World-v0", world="nowhere")
    with pytest.raises(ValueError, match=r"world: expected a folder or one of \[.*\], got ''"):
        gym.make("sfv_world/World-v0", world="")
    with pytest.raises(
        TypeError, match="unexpected keyword argument 'sweeps': expected some of tolerance, .*max_sweeps"
    ):
        gym.make("sfv_world/World-v0", world=tiny_world, sweeps=3)
    with pytest.raises(ValueError, match="expected start frames in starts.safetensors, found none. Pass frames"):
        WorldEnv(sfv_world.World(tiny_world.model)).reset()


@pytest.mark.parametrize(
    "kind, decoding, advice",
    [
        ("frame-parallel", {"max_sweeps": 1, "draft": "zeros"}, "before it converged. Raise max_sweeps"),
        ("autoregressive", {"max_sweeps": 1, "draft": "zeros"}, "before it converged. Raise max_sweeps"),
        ("bands", {"tolerance": 1e-12}, "what is left is rounding. Raise the tolerance"),
    ],
)
def test_a_frame_that_did_not_converge_is_never_silent(build_world, kind, decoding, advice):
    env = WorldEnv(build_world(kind), **decoding)
    env.reset(seed=0)
    with pytest.warns(RuntimeWarning, match=rf"certificate: expected at most (0.001|1e-12), got \d.*{advice}"):
        info = env.step(0)[4]
    assert info["certificate"] > env.world.decoding.tolerance


def test_arguments_of_other_types_are_told(build_world):
    """Outside these tests nothing checks annotations."""
    wrong = [
        ({"temperature": "0.9"}, "temperature: expected at least 0, got '0.9'"),
        ({"block": 2.0}, "block: expected None or at least 1, a whole number, got 2.0"),
        ({"world": None}, "world: expected a folder or one of"),
        ({"num_envs": 2.0}, "num_envs: expected an integer of at least 1, got 2.0"),
        ({"max_episode_steps": "5"}, "max_episode_steps: expected an integer of at least 1, got '5'"),
    ]
    script = f"""
from functools import partial
from sfv_world import load_world
from sfv_world.envs.sb3 import WorldVecEnv
from sfv_world.envs.vector_env import WorldVectorEnv

world = load_world({str(build_world())!r})
calls = [(partial(WorldVectorEnv, **{{"world": world}} | kwargs), message) for kwargs, message in {wrong}]
calls += [(partial(WorldVecEnv, world), "envs: expected a WorldVectorEnv, as `gymnasium.make_vec` makes it, got World")]
calls += [(partial(load_world, world.folder, decoding={{}}), "decoding: expected a DecodingConfig or None, got dict")]
for call, message in calls:
    try:
        call()
    except ValueError as error:
        assert str(error).startswith(message), error
    else:
        raise AssertionError(message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_frames_that_are_not_finite_are_told(build_world):
    env = WorldEnv(build_world(), temperature=1e38)
    env.reset(seed=0)
    with pytest.warns(RuntimeWarning, match=r"certificate: expected at most 0.001, got nan. The frame is not finite"):
        env.step(0)


@ONE_KIND
def test_options_of_one_environment_are_not_anothers(tiny_world):
    other = WorldEnv(tiny_world, temperature=0.0)
    assert tiny_world.decoding.temperature == 1.0 and other.world.model is tiny_world.model
    other.action_space.seed(0)
    assert other.action_space is not tiny_world.action_space
