"""Clips of released models: one chunk is sample, clean and decode; restarts, start frames and their order."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from released import TINY, close, count_caches
from test_vae import image_vae, wan_vae
from tiny import normal, randomised
from torch.testing._internal.distributed.fake_pg import FakeStore

from sfv_world.codec.vae import ImageCodec, WanCodec, to_frames
from sfv_world.decoding.solver import DecodingConfig, SolverConfig
from sfv_world.released import ReleasedFlow, clips, load_released, sample
from sfv_world.released.clips import ClipConfig, draw_clips
from sfv_world.released.pipeline import Follower
from sfv_world.released.sampling import clean

GRID, ROWS = (1, 2), 2
CONFIG = ClipConfig(chunk=4, context=2, decoding=SolverConfig(block=1), seed=3)


@pytest.fixture(scope="module")
def flow():
    """A model of videos of latents with 4 channels, 2 x 2 of them a token; every weight matters."""
    return randomised(ReleasedFlow(replace(TINY, in_channels=4)), scale=0.1).eval()


@pytest.fixture(scope="module")
def codec():
    return WanCodec(wan_vae())


@pytest.fixture(scope="module")
def draw(flow, codec):
    return partial(draw_clips, flow, codec, TEXT, GRID)


TEXT = normal(ROWS, 3, 5, seed=1)


def noise_of(*frames):
    """The noise of seed 3, for so many frames and then so many."""
    generator = torch.Generator().manual_seed(CONFIG.seed)
    noise = [torch.randn(ROWS, 2, 16, generator=generator) for _ in range(sum(frames))]
    return torch.stack(noise, dim=1).split(frames, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_one_chunk_is_sample_clean_decode(flow, codec, draw, guidance):
    options = {"guidance": guidance, "unconditional": -TEXT}
    found = draw(4, replace(CONFIG, guidance=guidance), unconditional=-TEXT)
    expected = sample(flow, *noise_of(4), TEXT, GRID, **options)
    close(found.tokens, expected.tokens, atol=0)
    close(found.log_prob, expected.log_prob, atol=0)
    pixels = codec.decode(flow.latents(clean(flow, expected.tokens, TEXT, GRID, 0.5), GRID))
    assert found.frames.shape == (ROWS, 13, 16, 32, 3)
    assert (found.frames.int() - to_frames(pixels).int()).abs().max() <= 1
    assert found.frames.float().std() > 1 and found.guided == bool(guidance)


def test_attention_is_planned_for_no_shape_of_a_clip(draw, planned):
    draw(1, CONFIG)
    assert planned and not any(planned) and torch.backends.cuda.cudnn_sdp_enabled()


@torch.no_grad()
def test_longer_clips_restart_from_the_last_latents(flow, codec, draw):
    found = draw(7, CONFIG)
    assert found.frames.shape == (ROWS, 25, 16, 32, 3) and found.log_prob.shape == (ROWS, 7, 2)
    noise = noise_of(4, 2, 1)
    tokens = sample(flow, noise[0], TEXT, GRID).tokens
    for z in noise[1:]:
        more = sample(flow, z, TEXT, GRID, first=tokens[:, -2:]).tokens
        tokens = torch.cat([tokens, more[:, 2:]], dim=1)
    close(found.tokens, tokens, atol=1e-4)
    # The frames of a chunk are cleaned with those that it began with.
    chunks = [(tokens[:, :4], 0), (tokens[:, 2:6], 2), (tokens[:, 4:], 2)]
    cleaned = [clean(flow, chunk, TEXT, GRID, 0.5)[:, known:] for chunk, known in chunks]
    alone = [clean(flow, chunk[:, known:], TEXT, GRID, 0.5) for chunk, known in chunks]
    shown, other = (to_frames(codec.decode(flow.latents(torch.cat(x, dim=1), GRID))).int() for x in (cleaned, alone))
    assert (found.frames.int() - shown).abs().max() <= 1 < (found.frames.int() - other).abs().max()
    # A restart forgets: with all of its past in one chunk the fifth frame is another.
    whole = draw(7, replace(CONFIG, chunk=7))
    close(found.tokens[:, :4], whole.tokens[:, :4])
    assert (found.tokens[:, 4] - whole.tokens[:, 4]).abs().max() > 1e-3


def test_a_restart_lets_go_of_the_keys_and_values_before(flow, draw, monkeypatch):
    counts = count_caches(monkeypatch, flow.block(-1))
    draw(7, CONFIG)
    assert counts == [1, 1, 1]


@torch.no_grad()
def test_start_frames_are_shown_and_continued(flow, codec, draw):
    start = codec.encode(normal(ROWS, 1, 16, 32, 3).tanh())
    found = draw(3, CONFIG, start=start)
    given, noise = noise_of(1, 2)
    first = flow.tokens(start) + 0.5 * given
    expected = sample(flow, noise, TEXT, GRID, first=first)
    close(found.tokens, expected.tokens)
    assert found.log_prob.shape == (ROWS, 2, 2) and found.frames.shape[1] == 9
    assert torch.equal(found.frames[:, :1], to_frames(codec.decode(start)))


def test_jacobi_and_sequential_clips_are_the_same(draw):
    sequential = draw(5, CONFIG)
    jacobi = draw(5, replace(CONFIG, decoding=SolverConfig(tolerance=1e-5)))
    close(jacobi.tokens, sequential.tokens, atol=1e-3)
    assert (jacobi.frames.int() - sequential.frames.int()).abs().max() <= 1
    cold = draw(5, replace(CONFIG, decoding=SolverConfig(block=1, temperature=0.0)))
    assert not torch.equal(cold.tokens, sequential.tokens)
    assert torch.equal(
        cold.tokens, draw(5, replace(CONFIG, decoding=SolverConfig(block=1, temperature=0.0), seed=4)).tokens
    )


def test_progress_is_told_in_order(draw):
    told = []
    draw(5, CONFIG, progress=told.append)
    assert told == ["drawn"] * 4 + ["decoded"] * 4 + ["drawn", "decoded"]


@torch.no_grad()
def test_an_image_is_cleaned_by_the_score_and_decoded():
    flow = randomised(
        ReleasedFlow(replace(TINY, in_channels=4, shallow_block_local=False, learnable_self_denoiser=False)), scale=0.05
    ).eval()
    codec = ImageCodec(image_vae())
    found = draw_clips(flow, codec, TEXT, GRID, 1, replace(CONFIG, noise=0.3))
    tokens = sample(flow, *noise_of(1), TEXT, GRID).tokens
    pixels = codec.decode(flow.latents(clean(flow, tokens, TEXT, GRID, 0.3), GRID))
    assert found.frames.shape == (ROWS, 1, 4, 8, 3)
    assert (found.frames.int() - to_frames(pixels).int()).abs().max() <= 1
    with pytest.raises(ValueError, match="latent_frames: expected 1, since this is a model of images, got 2"):
        draw_clips(flow, codec, TEXT, GRID, 2, CONFIG)


def test_clips_are_drawn_in_inference_mode_too(codec):
    flow = randomised(ReleasedFlow(replace(TINY, in_channels=4, learnable_self_denoiser=False)), scale=0.1).eval()
    expected = draw_clips(flow, codec, TEXT, GRID, 3, CONFIG)
    with torch.inference_mode():
        found = draw_clips(flow, codec, TEXT + 0, GRID, 3, CONFIG)
    assert torch.equal(found.frames, expected.frames)


def test_what_does_not_fit_is_told(draw):
    with pytest.raises(
        ValueError, match="context: expected at least 1 latent frame and fewer than the chunk's 4, got 4"
    ):
        replace(CONFIG, context=4)
    for noise in (0.0, math.inf):
        with pytest.raises(ValueError, match=f"noise: expected a positive number, got {noise}"):
            replace(CONFIG, noise=noise)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=rf"seed: expected 0 to 2\*\*32 - 1, got {seed}"):
            replace(CONFIG, seed=seed)
    for guidance in (-1.0, math.inf):
        with pytest.raises(ValueError, match=f"guidance: expected at least 0, got {guidance}"):
            replace(CONFIG, guidance=guidance)
    for wrong in (DecodingConfig(guidance=1.0), DecodingConfig(denoise="causal"), SolverConfig(draft="learned")):
        with pytest.raises(ValueError, match=r"decoding: expected a SolverConfig without the draft 'learned' .* got "):
            replace(CONFIG, decoding=wrong)
    with pytest.raises(
        ValueError, match="start: expected fewer latent frames than the clip's 2 and the chunk's 4, got 2"
    ):
        draw(2, CONFIG, start=torch.zeros(ROWS, 2, 4, 2, 4))
    with pytest.raises(ValueError, match="guidance 2.0 needs the states of the unconditional text"):
        draw(2, replace(CONFIG, guidance=2.0))


def test_a_follower_keeps_the_order_and_raises():
    done = []
    with Follower(torch.device("cpu")) as follower:
        follower.submit(done.append, torch.tensor(1))
        follower.submit(done.append, torch.tensor(2))
    assert done == [1, 2]
    with pytest.raises(ZeroDivisionError), Follower(torch.device("cpu")) as follower:
        follower.submit(lambda: 1 / 0)
    with Follower(torch.device("cuda"), behind=False) as follower:
        follower.submit(done.append, torch.tensor(3))
        assert done == [1, 2, 3]


@pytest.mark.parametrize("denoiser", [False, True])
def test_the_deep_flow_waits_where_the_score_needs_its_shared_layers(codec, tmp_path, monkeypatch, denoiser):
    told = []

    class Told(Follower):
        def __init__(self, device, behind=True):
            told.append(behind)
            super().__init__(device, behind)

    monkeypatch.setattr(clips, "Follower", Told)
    shape = replace(TINY, in_channels=4, learnable_self_denoiser=denoiser)
    torch.save(ReleasedFlow(shape).state_dict(), tmp_path / "tiny.pth")
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        for spread in (False, True):
            flow = load_released(tmp_path / "tiny.pth", shape, spread=spread).requires_grad_(False)
            draw_clips(flow, codec, TEXT, GRID, 1, CONFIG)
    finally:
        dist.destroy_process_group()
    assert told == [True, denoiser]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_draws_the_same_clips_behind_the_deep_flow(flow, codec, draw):
    on_cpu = draw(7, CONFIG)
    device_flow = ReleasedFlow(flow.config).cuda().eval()
    device_flow.load_state_dict(flow.state_dict())
    device_codec = WanCodec(wan_vae()).cuda()
    on_device = draw_clips(device_flow, device_codec, TEXT.cuda(), GRID, 7, CONFIG)
    close(on_device.tokens, on_cpu.tokens, atol=5e-3)
    assert (on_device.frames.int() - on_cpu.frames.int()).abs().float().mean() < 1
    with pytest.raises(ZeroDivisionError), Follower(torch.device("cuda")) as follower:
        follower.submit(lambda: 1 / 0)
