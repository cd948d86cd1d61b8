"""What a device asks of a step, shown without one: nothing of it is read in between, its clock is data, its layers may be bfloat16.

The device here is torch's `meta`: it computes shapes and no numbers, so whatever waits for one raises.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from sfv_world import World, graphs, load_world
from sfv_world.envs import vector_env
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.envs.world_env import WorldEnv
from sfv_world.transfer import Fetch, to_device

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 24, 3), np.uint8)
ACTIONS = np.random.default_rng(1).integers(0, 3, (3, 8))
OPTIONS = [{}, {"denoise": "causal"}, {"denoise": "lookahead"}, {"guidance": 1.5, "temperature": 0.9}]


class NothingWaits(TorchDispatchMode):
    """Refuses copies to the device that are not queued. Copies from it, and conditions on it, `meta` itself refuses."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, result = kwargs or {}, function(*args, **(kwargs or {}))
        source = [x for x in args if isinstance(x, Tensor)]
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            queued = kwargs.get("non_blocking", False) or (len(args) > 2 and args[2])
            assert queued or source[-1].device == result.device, f"{function} makes the host wait"
        return result


class Unread(Fetch):
    """Answers of a device that has none: zeros; it counts how often they were waited for."""

    waits = 0

    def __init__(self, tensors: Any):
        self.given = list(tensors)

    def wait(self) -> list[np.ndarray]:
        Unread.waits += 1
        return [torch.zeros_like(x, device="cpu").numpy() for x in self.given]


@pytest.fixture
def meta_world(build_world, monkeypatch) -> World:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it knows no such device
    world = load_world(build_world("bands"))
    world.model.to("meta")
    world.checksum = 0  # of weights that no one can read
    return world


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_reads_nothing_of_the_device(meta_world, options):
    world = meta_world
    world.decoding = replace(world.decoding, **options)
    world.step(world.start([0]), [0])  # constants go to the device once
    with NothingWaits():
        state = world.start([3, 4, 5])
        state, _ = world.step(state, ACTIONS[:, 0])
        state.put(np.array([1]), world.reset(VIDEO[:1, :4], ACTIONS[:1, :3], [7], clock=state.clock))
        state, _ = world.step(state[[0, 1, 1]], None)
        state, output = world.observe(state, ACTIONS[:, 1], VIDEO[:, 0])
        output.reward  # noqa: B018
    assert output.frames.is_meta and state.stream.cache.keys.is_meta


@pytest.mark.parametrize(("mode", "output"), [("NextStep", "torch"), ("NextStep", "numpy"), ("SameStep", "torch")])
def test_a_batch_of_environments_waits_for_flags_and_frames_alone(meta_world, monkeypatch, mode, output):
    monkeypatch.setattr(vector_env, "Fetch", Unread)
    envs = WorldVectorEnv(3, world=meta_world, output=output, autoreset_mode=mode, max_episode_steps=3)
    envs.reset(seed=0)
    envs.world.step(envs._state[:], ACTIONS[:, 0])  # constants go to the device once
    begun = []
    begin = envs._begin
    monkeypatch.setattr(envs, "_begin", lambda rows, *rest: begun.append(len(rows)) or begin(rows, *rest))
    with NothingWaits():
        for step in range(8):
            Unread.waits = 0
            results = envs.step(ACTIONS[:, step])
            # Flags of this step, or at the next one where they can wait; and what a NumPy caller is given.
            expected = {"SameStep": 1, "NextStep": int(step > 0)}[mode] if output == "torch" else 2
            assert Unread.waits == expected
    assert sum(begun) == 6
    assert all(isinstance(x, Tensor if output == "torch" else np.ndarray) for x in results[:4])


def test_arrays_go_over_and_come_back():
    array = np.arange(3.0)
    there = to_device(array, torch.device("cpu"))
    assert there.data_ptr() == array.ctypes.data
    (back, more) = Fetch([there, there[:2] > 0]).wait()
    np.testing.assert_array_equal(back, array)
    assert back is not array and more.tolist() == [False, True]
    assert Fetch([]).wait() == []


def test_the_certificate_is_warned_of_at_the_next_step(tiny_world, monkeypatch):
    envs = WorldVectorEnv(2, world=tiny_world, output="torch")
    envs.reset(seed=0)
    envs.step([0, 1])
    envs.world.decoding = replace(envs.world.decoding, tolerance=1e-12)
    with pytest.warns(RuntimeWarning, match="certificate: expected at most 1e-12"):
        envs.reset(seed=0)


# Recordings ----------------------------------------------------------------------------------------------------------


def traced(function: Any, inputs: Any) -> Any:
    """What a CUDA graph is, on the CPU: the operations of one call, everything but the inputs' numbers taken as it was."""
    own = [x.clone() for x in inputs]
    recording = make_fx(function)(*own)
    outputs = recording(*inputs)
    return lambda: [old.copy_(new) for old, new in zip(outputs, recording(*inputs), strict=True)], outputs


@pytest.mark.parametrize("options", OPTIONS[1:], ids=str)
def test_a_recorded_step_is_the_step(build_world, monkeypatch, options):
    """At any clock, for rows that know more or fewer frames, from states side by side, in environments of other options."""
    recordings = []
    monkeypatch.setattr(graphs, "record", lambda *given: recordings.append(0) or traced(*given))
    world = load_world(build_world("bands"))
    world.decoding = replace(world.decoding, **options)
    replayed = World(world.model, world.decoding, world.starts)
    replayed._recorder = graphs.Recorder()
    states = [one.reset(VIDEO[:, :2], ACTIONS[:, :1]) for one in (world, replayed)]
    fork = states[0][:]
    for step in range(7):
        if step == 4:
            for one, state in zip((world, replayed), states, strict=True):
                state.put(np.array([2]), one.reset(VIDEO[:1, :1], seeds=[9], clock=state.clock))
        fork, _ = replayed.step(fork, ACTIONS[:, 0])  # whose state is another one
        (a, x), (b, y) = (
            one.step(state, ACTIONS[:, step]) for one, state in zip((world, replayed), states, strict=True)
        )
        states = [a, b]
        for ours, theirs in zip(x, y, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 if ours.is_floating_point() else 1)
        assert torch.equal(a.stream.cache.visible, b.stream.cache.visible) and a.clock == b.clock
        torch.testing.assert_close(a.stream.cache.keys, b.stream.cache.keys, rtol=1e-4, atol=1e-4)
    assert len(recordings) == 3  # one for each place in the ring
    replayed.decoding = replace(world.decoding, tolerance=1e-2)
    replayed.step(states[1], [0, 0, 0])
    assert len(recordings) == 4


def test_what_cannot_be_recorded_is_told(build_world):
    with pytest.raises(ValueError, match="recorded: expected a world on a CUDA device, got one on cpu. Load it there"):
        load_world(build_world("bands")).recorded()
    for kind in ("frame-parallel", "autoregressive"):
        with pytest.raises(
            ValueError, match="recorded: expected a frame-parallel world whose shallow flow goes in bands"
        ):
            load_world(build_world(kind)).recorded()


# bfloat16 ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bfloat16_world(tiny_folder) -> World:
    return load_world(tiny_folder, dtype=torch.bfloat16)


def test_layers_compute_in_bfloat16_and_nothing_else(bfloat16_world):
    world = bfloat16_world
    for name, parameter in world.model.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if ".attn_blocks." in name else torch.float32), name
    state, output = world.step(world.start([1, 2]), [0, 1])
    assert state.stream.cache.keys.dtype == torch.bfloat16
    told = [*output, state.stream.tokens, *(x for stage in state.stream.stages for x in (stage.tokens, *stage.fields))]
    assert {x.dtype for x in told if x.is_floating_point()} == {torch.float32}


def test_bfloat16_stays_close_to_float32(bfloat16_world, tiny_world):
    ours, theirs = bfloat16_world.score(VIDEO, ACTIONS[:, :-1]), tiny_world.score(VIDEO, ACTIONS[:, :-1])
    assert 0 < (ours.bits_per_dim - theirs.bits_per_dim).abs().max() < 0.02


def test_in_bfloat16_streaming_is_scoring_in_parallel(bfloat16_world):
    world = bfloat16_world
    score, state = world.score(VIDEO, ACTIONS[:, :-1]), world.reset(VIDEO[:, :2], ACTIONS[:, :1])
    for n in range(2, 8):
        state, output = world.observe(state, ACTIONS[:, n - 1], VIDEO[:, n])
        torch.testing.assert_close(output.bits_per_dim, score.bits_per_dim[:, n], rtol=0, atol=0.01)
        assert not output.certificate.any()


def test_in_bfloat16_what_was_evaluated_is_returned(bfloat16_world):
    """Log-likelihood and noise are those of the very frame, under the layers as they compute; the certificate is float32's."""
    world = bfloat16_world
    state = world.reset(VIDEO[:, :3], ACTIONS[:, :2])
    before = state[:]
    after, output = world.step(state, ACTIONS[:, 2])
    assert (output.certificate <= world.decoding.tolerance).all()
    if world.model.config.flow.bands:
        assert (output.certificate < 1e-4).all()
    from sfv_world.decoding.frames import read_frame

    with torch.no_grad():
        controls = world.model.controls(torch.eye(3)[ACTIONS[:, 2]], torch.ones(3, dtype=torch.bool))
        report = read_frame(world.model.flow, before.stream, after.stream.tokens, controls)
    log_likelihood = report.log_prob.sum(-1) + world.model.codec.log_det
    torch.testing.assert_close(output.log_likelihood, log_likelihood, rtol=1e-4, atol=0.5)
    torch.testing.assert_close(output.noise, report.noise, rtol=0, atol=0.05)


def test_environments_pass_the_dtype_on(build_world):
    folder = build_world("bands")
    for env in (WorldEnv(folder, dtype=torch.bfloat16), WorldVectorEnv(2, world=folder, dtype=torch.bfloat16)):
        env.reset(seed=0)
        assert env._state.stream.cache.keys.dtype == torch.bfloat16
        env.step(env.action_space.sample())
    with pytest.raises(ValueError, match="dtype: expected torch.float32 or torch.bfloat16, got torch.float16"):
        WorldEnv(folder, dtype=torch.float16)
    with pytest.raises(ValueError, match="dtype: expected None for a world that is loaded, got torch.bfloat16"):
        WorldEnv(load_world(folder), dtype=torch.bfloat16)
