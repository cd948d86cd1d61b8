"""Frames without loss: a bound on what they cost that no bound may undercut, and densities that are ones."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DISCRETE, tiny_model
from recorded import record
from test_latent_codec import random_codec
from tiny import normal

from sfv_world.codec.pixels import PixelCodec, PixelCodecConfig
from sfv_world.data.clips import Episodes, load_episodes
from sfv_world.lossless import lossless
from sfv_world.model import WorldModel
from sfv_world.world import World


def random_play(folder, world: World, seed: int) -> Episodes:
    """Episodes of frames of independent, uniformly random values: eight bits each, not less."""
    episodes = load_episodes(record(folder, world.action_space, lengths=(20, 18, 19, 22)))
    noise = np.random.default_rng(seed).integers(0, 256, episodes.frames.shape, np.uint8)
    return replace(episodes, frames=noise)


def test_nothing_random_costs_less_than_its_entropy(tiny_world: World, tmp_path) -> None:
    train, held_out = (random_play(tmp_path / str(seed), tiny_world, seed) for seed in (0, 1))
    found = lossless(tiny_world, train, held_out, clips=9, seed=0)
    assert 8 < found["bits_per_colour_value"] < 40 and 0 < found["of_the_residual"] < found["bits_per_colour_value"]
    assert found["frames"] == 9 * 8


def untrained(denoise: float | None) -> World:
    """A world to which all tokens are standard normal, its denoiser, if any, taking that part of what it sees for noise."""
    config = tiny_model("frame-parallel", DISCRETE, seed=0).config
    model = WorldModel(replace(config, denoiser=None if denoise is None else config.denoiser), DISCRETE)
    if model.denoiser and denoise is not None:
        linear = model.denoiser.here
        with torch.no_grad():
            linear.weight[-model.config.flow.channels :].fill_(0).fill_diagonal_(-denoise / model.config.noise)
    return World(model)


def test_the_choice_of_the_noise_comes_back(tmp_path) -> None:
    """The signal costs its cross-entropy; noise that is sent again as the residual costs its 128 levels a unit, and no more."""
    world = untrained(None)
    parts = [random_play(tmp_path / str(seed), world, seed) for seed in (0, 1)]
    middling = [replace(part, frames=64 + part.frames // 2) for part in parts]  # whose noise is nowhere cut off
    found = lossless(world, *middling, clips=20, seed=0)
    power = 0.5**2 / 3 + world.model.config.noise**2
    assert found["bits_per_colour_value"] == pytest.approx(
        (0.5 * math.log(2 * math.pi) + 0.5 * power) / math.log(2) + math.log2(128), abs=0.01
    )


def test_noise_that_is_taken_out_leaves_nothing_to_send(tmp_path) -> None:
    still = [random_play(tmp_path / str(seed), untrained(None), seed) for seed in (0, 1)]
    still = [replace(part, frames=np.full_like(part.frames, 128)) for part in still]
    noised, clean = (lossless(untrained(part), *still, clips=9, seed=0)["of_the_residual"] for part in (0.0, 1.0))
    assert noised == pytest.approx(math.log2(128 * 0.05 * math.sqrt(2 * math.pi * math.e)), abs=0.02)
    assert clean < 0.02


@pytest.mark.parametrize("noise", [0.004, 0.05])
def test_the_noise_of_pixels_and_their_place_in_a_cell_have_one_density(noise: float) -> None:
    codec, value = PixelCodec(PixelCodecConfig(1, 1, patch=1)), torch.tensor([[[100, 0, 255]]], dtype=torch.uint8)
    low = value / 128 - 1
    steps = torch.linspace(-8 * noise, 8 * noise + 1 / 128, 4001)
    signal = low + steps[:, None, None, None]
    log_density = codec.noise_log_density(signal, value.expand(4001, 1, 1, 3), noise)
    # All three values are as far into their cells, so that the density is one of theirs, three times.
    assert torch.trapezoid((log_density / 3).exp(), steps).item() == pytest.approx(1, abs=1e-3)
    drawn = codec.signal(value.expand(20_000, 1, 1, 3), torch.rand(20_000, 1, 1, 3)) + noise * normal(20_000, 1, 1, 3)
    mean, var = drawn.mean(0) - low, drawn.var(0)
    assert torch.allclose(mean, torch.full_like(mean, 1 / 256), atol=5 * noise / 20_000**0.5 + 1e-4)
    assert torch.allclose(var, torch.full_like(var, noise**2 + 1 / 128**2 / 12), rtol=0.05)
    # Much noise hides the cell: a normal density around its middle.
    z = (signal - low - 1 / 256) / 0.5
    wide = codec.noise_log_density(signal, value.expand(4001, 1, 1, 3), 0.5)
    assert torch.allclose(wide, (-0.5 * z**2 - math.log(0.5 * (2 * math.pi) ** 0.5)).sum((1, 2, 3)), atol=1e-3)


def test_the_noise_of_latents_is_normal_around_them() -> None:
    codec = random_codec()
    frames = torch.randint(256, (3, 16, 24, 3), generator=torch.Generator().manual_seed(0)).byte()
    signal = codec.signal(frames)
    z = normal(*signal.shape)
    found = codec.noise_log_density(signal + 0.3 * z, frames, 0.3)
    expected = torch.distributions.Normal(signal, 0.3).log_prob(signal + 0.3 * z).sum((1, 2, 3))
    assert torch.allclose(found, expected, rtol=1e-4)
