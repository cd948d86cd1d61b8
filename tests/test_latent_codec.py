"""Worlds of latents: the codec's own laws, and those of a world on top of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DISCRETE
from gymnasium.utils.env_checker import check_env
from tiny import KINDS, normal, of_kind, randomised

from sfv_world import World, load_world
from sfv_world.checkpoint import (
    CODEC,
    CONFIG,
    MODEL,
    load_autoencoder,
    load_model,
    load_tensors,
    save_autoencoder,
    save_model,
    save_tensors,
)
from sfv_world.codec.latent import Autoencoder, AutoencoderConfig, LatentCodec, LatentCodecConfig
from sfv_world.codec.pixels import PixelCodecConfig
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.envs.world_env import WorldEnv
from sfv_world.film import as_shown
from sfv_world.flow.model import FlowConfig
from sfv_world.flow.transformer import TransformerConfig
from sfv_world.model import ModelConfig, WorldModel, model_config
from sfv_world.training.objective import Batch, ObjectiveConfig, patch_weights, world_loss

SHAPE = AutoencoderConfig(16, 24, space=4, latents=3, base=16)
FRAMES = 7  # two windows of the tiny world and a bit
ACTIONS = np.random.default_rng(1).integers(0, 3, (3, FRAMES - 1))
VIDEO = np.random.default_rng(0).integers(0, 256, (3, FRAMES, 16, 24, 3), np.uint8)


def random_codec(patch: int = 2) -> LatentCodec:
    """A codec of random weights, fitted to random frames."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = LatentCodec(LatentCodecConfig(SHAPE, patch))
    randomised(codec.autoencoder, 1, 0.05)
    frames = torch.from_numpy(VIDEO).flatten(0, 1)
    codec.autoencoder.standardise(frames)
    codec.fit(frames, SHAPE.noise)
    return codec


def latent_model(kind: str, seed: int = 0) -> WorldModel:
    codec = random_codec()
    sizes = TransformerConfig(32, 2, head_dim=16, window=3), TransformerConfig(32, 1, head_dim=16)
    flow = of_kind(FlowConfig(codec.config.channels, codec.config.grid, *sizes, control_width=8), kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = WorldModel(ModelConfig(codec.config, flow, noise=0.3, control_tokens=2), DISCRETE)
    randomised(model, seed, 0.04)
    model.codec.load_state_dict(codec.state_dict())
    with torch.no_grad():  # rewards of a few units, and about one frame in twenty ends an episode
        bias = model.heads.mlp[-1].bias
        bias[0] -= 3
        bias[1:] -= model.heads.bins.abs().log1p().repeat(2) * 3
    return model


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_model(folder, latent_model(request.param), {"data": {"fps": 8.75}})
    starts = {"frames": torch.from_numpy(VIDEO[:, :3]), "actions": torch.rand(3, 3, 3)}
    save_tensors(folder / "starts.safetensors", starts)
    return folder


@pytest.fixture(scope="module")
def world(folder):
    return load_world(folder)


# The codec


def test_a_frame_becomes_tokens_and_a_frame_again():
    for patch, grid, channels in ((1, (4, 6), 3), (2, (2, 3), 12)):
        codec, frames = random_codec(patch), torch.from_numpy(VIDEO)
        assert (codec.config.grid, codec.config.channels, codec.config.signal) == (grid, channels, (4, 6, 3))
        signal = codec.signal(frames)
        tokens = codec.encode(signal)
        assert signal.shape == (3, FRAMES, 4, 6, 3) and tokens.shape == (3, FRAMES, grid[0] * grid[1], channels)
        torch.testing.assert_close(codec.decode(tokens), signal, rtol=1e-4, atol=1e-4)
        shown = codec.frames(codec.decode(tokens))
        assert shown.shape == frames.shape and shown.dtype == torch.uint8
        assert torch.equal(codec.signal(frames), signal) and torch.equal(codec.frames(codec.decode(tokens)), shown)


def test_frames_stand_alone():
    codec, frames = random_codec(), torch.from_numpy(VIDEO)
    torch.testing.assert_close(codec.signal(frames)[1, 2], codec.signal(frames[1, 2]), rtol=1e-4, atol=1e-5)


def test_latents_are_standardised_and_tokens_are_uncorrelated():
    codec = random_codec()
    signal = codec.signal(torch.from_numpy(VIDEO))
    torch.testing.assert_close(signal.flatten(0, -2).mean(0), torch.zeros(3), rtol=0, atol=1e-3)
    torch.testing.assert_close(signal.flatten(0, -2).var(0), torch.ones(3), rtol=1e-3, atol=1e-3)
    noised = codec.encode(signal).flatten(0, -2).T.cov() + torch.diag((SHAPE.noise / codec.scale).square())
    torch.testing.assert_close(noised, torch.eye(12), rtol=0, atol=1e-3)
    assert (codec.scale.diff() <= 1e-6).all()  # largest components first
    torch.testing.assert_close(codec.transform @ codec.transform.T, torch.eye(12), rtol=0, atol=1e-5)


def test_log_det_is_that_of_the_jacobian():
    codec = random_codec().double()
    matrix = torch.autograd.functional.jacobian(codec.encode, normal(4, 6, 3, dtype=torch.float64)).reshape(72, 72)
    torch.testing.assert_close(torch.linalg.slogdet(matrix).logabsdet, codec.log_det, rtol=0, atol=1e-5)


def test_the_codec_is_frozen():
    model = latent_model("bands").train()
    assert model.training and not model.codec.autoencoder.training
    before = {name: tensor.clone() for name, tensor in model.codec.state_dict().items()}
    length = FRAMES
    zeros, ones = torch.zeros(3, length), torch.ones(3, length, dtype=torch.bool)
    batch = Batch(torch.from_numpy(VIDEO), torch.rand(3, length, 3), ones, zeros, ~ones, ones, ~ones)
    world_loss(model, batch, ObjectiveConfig(), torch.Generator().manual_seed(0)).value.backward()
    assert all(parameter.grad is None for parameter in model.codec.parameters())
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("flow."))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.codec.state_dict().items())


def test_what_moved_weighs_by_the_noise():
    model = latent_model("bands")
    still = normal(2, 1, 6, 12).expand(-1, 5, -1, -1)
    assert torch.equal(patch_weights(still, model, 50.0), torch.ones(2, 5, 6))
    moved = still.clone()
    moved[1, 2, 0] += 3
    weights = patch_weights(moved, model, 50.0)
    assert weights[1, 3:, 0].min() > 2 * weights[1, :3].max()


# The world


def test_observing_frame_by_frame_is_scoring_in_parallel(world):
    seeds = [5, 0, 2**63 - 1]
    score = world.score(VIDEO, ACTIONS, seeds)
    state = world.reset(VIDEO[:, :1], seeds=seeds)
    for n in range(1, FRAMES):
        state, output = world.observe(state, ACTIONS[:, n - 1], VIDEO[:, n])
        torch.testing.assert_close(output.log_likelihood, score.log_likelihood[:, n], rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(output.bits_per_dim, -output.log_likelihood / (np.log(2) * 4 * 6 * 3))


def test_imagined_frames_have_the_likelihood_of_a_parallel_pass(world):
    state, tokens, outputs = world.reset(VIDEO[:, :1]), [], []
    tokens.append(state.stream.tokens)
    for action in ACTIONS.T:
        state, output = world.step(state, action)
        outputs.append(output)
        tokens.append(state.stream.tokens)
    assert outputs[0].frames.shape == (3, 16, 24, 3) and outputs[0].certificate.max() < 1e-3
    vectors = torch.zeros(3, FRAMES, 3)
    vectors[:, 1:] = torch.eye(3)[ACTIONS]
    reading = world.model(torch.stack(tokens, 1), vectors, torch.arange(FRAMES).expand(3, -1) > 0)
    for n, output in enumerate(outputs, start=1):
        torch.testing.assert_close(output.log_likelihood, reading.log_likelihood[:, n], rtol=1e-4, atol=1e-2)


def test_a_row_does_not_depend_on_its_neighbours(world):
    state, alone = world.reset(VIDEO, ACTIONS, [4, 5, 6]), world.reset(VIDEO[1:2], ACTIONS[1:2], [5])
    for _ in range(3):
        (state, together), (alone, single) = world.step(state, [0, 1, 2]), world.step(alone, [1])
        torch.testing.assert_close(together.log_likelihood[1:2], single.log_likelihood, rtol=1e-3, atol=1e-2)
        torch.testing.assert_close(state.stream.tokens[1:2], alone.stream.tokens, rtol=0, atol=1e-3)
        assert (together.frames[1:2].int() - single.frames.int()).abs().max() <= 1


def test_the_noise_of_a_real_trajectory_decodes_to_it(world):
    found = world.abduct(VIDEO, ACTIONS)
    state = found.state[:]
    for n in range(FRAMES - 1):
        state, output = world.step(state, ACTIONS[:, n], found.noise[:, n])
        torch.testing.assert_close(output.log_likelihood, found.log_likelihood[:, n], rtol=1e-3, atol=0.05)
        assert (output.frames.int() - found.frames[:, n].int()).abs().max() <= 2


def test_a_checkpoint_holds_the_codec(folder, world, tmp_path):
    assert any(name.startswith("codec.autoencoder.") for name in load_tensors(folder / MODEL)[0])
    save_model(tmp_path, world.model)
    again = load_world(tmp_path)
    assert again.checksum == world.checksum and again.model.config == world.model.config
    assert torch.equal(again.score(VIDEO, ACTIONS).log_likelihood, world.score(VIDEO, ACTIONS).log_likelihood)
    assert not any(parameter.requires_grad for parameter in again.model.codec.parameters())


def test_imagined_frames_are_read_like_any_others(world):
    with pytest.raises(ValueError, match=r"noised: expected False.*latents.*got True.*Leave it out"):
        world.reset(VIDEO[:, :2], noised=True)
    assert as_shown(world, VIDEO[0], 0).shape == VIDEO[0].shape


def test_environments(folder):
    check_env(WorldEnv(folder), skip_render_check=True)
    envs = WorldVectorEnv(2, world=folder)
    one = WorldEnv(folder)
    frames, _ = envs.reset(seed=[3, 4])
    frame, _ = one.reset(seed=3)
    assert np.array_equal(frames[0], frame)
    frames, *_ = envs.step(np.array([1, 1]))
    frame, *_ = one.step(1)
    assert np.abs(frames[0].astype(int) - frame).max() <= 1


@pytest.mark.parametrize("kind", ["frame-parallel", "autoregressive"])
@pytest.mark.parametrize(("patch", "grid", "channels"), [(1, (8, 8), 16), (2, (4, 4), 64)])
def test_one_dial_sizes_a_latent_model(kind, patch, grid, channels):
    config = model_config(2, patch=patch, kind=kind, noise=0.3, autoencoder=AutoencoderConfig())
    assert (config.flow.grid, config.flow.channels, config.dimensions) == (grid, channels, 1024)
    assert sum(config.flow.bands) == (channels if kind == "frame-parallel" else 0)


# Mistakes


def test_folders_that_hold_no_codec(folder, tmp_path):
    with pytest.raises(ValueError, match=r"expected a codec's folder.*found no config.json.*train-codec"):
        load_autoencoder(tmp_path)
    with pytest.raises(ValueError, match=r"expected a codec of 'codec_format' 1, got \['format', .*train-codec"):
        load_autoencoder(folder)
    save_autoencoder(tmp_path, Autoencoder(SHAPE))
    with pytest.raises(ValueError, match=r"expected a world, got a codec.*sfv-world train --codec"):
        load_model(tmp_path)
    tensors, _ = load_tensors(tmp_path / CODEC)
    save_tensors(tmp_path / CODEC, tensors | {"mean": torch.zeros(5)})
    with pytest.raises(ValueError, match=r"1 tensors do not fit config.json \(mean: expected \(3,\), got \(5,\)\)"):
        load_autoencoder(tmp_path)
    (tmp_path / CODEC).write_bytes(b"half")
    with pytest.raises(ValueError, match=r"expected a complete safetensors file"):
        load_autoencoder(tmp_path)
    (tmp_path / CODEC).unlink()
    with pytest.raises(ValueError, match=r"expected a safetensors file, found none"):
        load_autoencoder(tmp_path)
    for text in ("{", '{"codec_format": 1}', '{"codec_format": 1, "codec": {"height": 64, "colour": 3}}'):
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=r"expected a codec's configuration, got one that cannot be read"):
            load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": 0}, "base: expected a multiple of"),
        ({"base": -16}, "base: expected a multiple of"),
        ({"space": 3}, "space: expected a power of two from 2 on, got 3"),
        ({"space": 16, "height": 40}, "space: expected a divisor of height and width, got 16 for frames of 40 x 24"),
        ({"base": 20}, "base: expected a multiple of 16.*got 20"),
        ({"latents": 0}, "latents, noise: expected at least 1 and 0, got 0 and 0.3"),
        ({"noise": float("nan")}, "latents, noise: expected at least 1 and 0, got 3 and nan"),
    ],
)
def test_shapes_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **changes)


def test_a_configuration_says_which_codec(folder, tmp_path):
    from pydantic import TypeAdapter

    adapter = TypeAdapter(PixelCodecConfig | LatentCodecConfig)
    for config in (PixelCodecConfig(16, 24, 4), LatentCodecConfig(SHAPE, 2)):
        assert adapter.validate_python(adapter.dump_python(config, mode="json")) == config
    assert isinstance(World(load_model(folder)[0]).model.codec, LatentCodec)


def test_what_a_world_says_is_the_same_under_a_callers_autocast(world):
    def said():
        state, imagined = world.step(world.reset(VIDEO[:, :1]), [0, 1, 2])
        _, observed = world.observe(state, [0, 1, 2], VIDEO[:, 1])
        return (
            world.score(VIDEO, ACTIONS).log_likelihood,
            imagined.frames,
            imagined.log_likelihood,
            observed.log_likelihood,
        )

    expected = said()
    with torch.autocast("cpu", torch.bfloat16):
        found = said()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
