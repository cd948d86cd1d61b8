"""What a device asks of the code, shown without one: copies that are queued, layers in bfloat16, and all tests marked `gpu`."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfv_world import World, load_world
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.envs.world_env import WorldEnv
from sfv_world.transfer import Fetch, to_device

VIDEO = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 24, 3), np.uint8)
ACTIONS = np.random.default_rng(1).integers(0, 3, (3, 8))


@pytest.mark.skipif(
    sys.platform != "linux" or torch.backends.cuda.is_built(), reason="pretends on Linux, in builds without CUDA"
)
def test_what_a_device_is_to_show_a_pretended_one_shows():
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "pretended", "-m", "gpu", "-p", "no:cacheprovider", tests]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tests)}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed, 1 skipped" in done.stdout, done.stdout + done.stderr


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


def test_attention_is_planned_for_no_shape_of_decoding(tiny_world, planned):
    tiny_world.step(tiny_world.start([1, 2]), [0, 1])
    assert planned and not any(planned) and torch.backends.cuda.cudnn_sdp_enabled()


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
