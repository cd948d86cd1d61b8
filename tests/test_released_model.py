"""The released layout: the reference tensors of a parallel pass, and the laws behind them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from released import IMAGE, TINY, VIDEO, close, load_reference, tiny_released
from tiny import normal

from sfv_world.released import ReleasedFlow, sample
from sfv_world.released.model import attend_to_frames


@pytest.fixture(scope="module", params=[VIDEO, IMAGE], ids=["video", "image"])
def reference(request):
    return load_reference(request.param)


@pytest.fixture(scope="module", params=[(1, 1, 2), (1, 2), (1,)], ids=str)
def tiny(request):
    """Models of an odd and an even number of blocks, and of one."""
    return tiny_released(request.param)


@torch.no_grad()
def test_every_block_is_that_of_the_reference(reference):
    flow, tensors, x = reference.flow, reference.tensors, reference.x
    stages, _ = flow.stages(x, reference.text, reference.grid)
    assert len(stages) == 4
    for index, stage in enumerate(stages):
        activation = flow.orient(index, stage.tokens.reshape(x.shape))
        close(activation.flatten(), tensors[f"activation.{index}"].flatten())
        close(-stage.fields.sigma.log().flatten(), tensors[f"logdet.{index}"].flatten())


@torch.no_grad()
def test_noise_and_log_likelihood_are_those_of_the_reference(reference):
    flow = reference.flow
    encoding = flow(reference.x, reference.text, reference.grid)
    close(flow.latents(encoding.noise, reference.grid), reference.latents("z"))
    close(encoding.noise.flatten(), reference.tensors["activation.4"].flatten())
    close(encoding.latents.flatten(), reference.tensors["activation.3"].flatten())
    log_likelihood = encoding.log_prob.sum((1, 2))
    # About -1200 nats in float32: one unit in the last place is 1.2e-4.
    torch.testing.assert_close(log_likelihood, reference.tensors["log_likelihood"], rtol=5e-7, atol=1e-4)
    close(encoding.fields.normalise(encoding.latents)[0], encoding.noise, atol=0)


@torch.no_grad()
def test_denoiser_is_that_of_the_reference(reference):
    flow, given = reference.flow, (reference.x, reference.text, reference.grid)
    if "denoiser" not in reference.tensors:
        with pytest.raises(ValueError, match="learnable_self_denoiser"):
            flow.score(*given)
        return
    score = flow.score(*given)
    close(flow.latents(score, reference.grid), reference.latents("denoiser"))
    close(flow.denoise(*given), reference.x - 0.3 * score, atol=0)


def test_log_det_is_that_of_the_jacobian(tiny):
    flow, tokens, text = tiny.flow, tiny.tokens[:1, :2], tiny.text[:1]
    matrix = torch.autograd.functional.jacobian(lambda x: flow(x, text, tiny.grid).noise, tokens)
    matrix = matrix.reshape(2, tokens[0, 0].numel(), 2, -1)
    log_det = flow(tokens, text, tiny.grid).log_det
    for frame in range(2):
        close(torch.linalg.slogdet(matrix[frame, :, frame]).logabsdet, log_det[0, frame].sum(), atol=1e-9)
    assert not matrix[0, :, 1].any()


@torch.no_grad()
def test_a_row_of_many_is_that_row_alone(tiny):
    many, alone = (tiny.flow(tiny.tokens[r], tiny.text[r], tiny.grid).log_prob for r in (slice(0, 2), slice(1, 2)))
    close(many[1:], alone, atol=1e-9)
    assert not torch.equal(alone, tiny.flow(tiny.tokens[1:], tiny.text[:1], tiny.grid).log_prob)


def test_tokens_and_latents_are_inverse():
    flow, latents = ReleasedFlow(TINY), normal(2, 3, 2, 4, 6)
    assert torch.equal(flow.latents(flow.tokens(latents), (2, 3)), latents)
    assert torch.equal(flow.tokens(latents)[0, 0, 1, :4], latents[0, 0, :, 0, 2:4].T.flatten())


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 2, 10])
def test_the_denoisers_attention_is_that_of_its_mask(ahead, window):
    text, frames, slots = 2, 4, 3
    q, k, v = normal(3, 2, 1, text + frames * slots, 16)
    frame = torch.cat([torch.full((text,), -1), torch.arange(frames).repeat_interleave(slots)])
    last = frame.clamp(min=0)[:, None] + ahead - 1
    mask = (frame <= last) & (frame >= last - window) | (frame == -1)
    expected = F.scaled_dot_product_attention(q, k, v, mask if ahead else None)
    close(attend_to_frames(q, k, v, text=text, frames=frames, ahead=ahead, window=window), expected, atol=1e-6)


def test_shapes_that_do_not_fit_are_told():
    flow, text = ReleasedFlow(TINY), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"tokens must have the shape \(batch, frames, 4, 8\) for grid \(2, 2\)"):
        flow(torch.zeros(2, 1, 3, 8), text, (2, 2))
    with pytest.raises(ValueError, match=r"text must have the shape \(2, 3, 5\), got \(2, 2, 5\)"):
        flow.denoise(torch.zeros(2, 1, 4, 8), text[:, :2], (2, 2))
    with pytest.raises(ValueError, match="guidance 2.0 needs"):
        sample(flow, torch.zeros(2, 1, 4, 8), text, (2, 2), guidance=2.0)
    image = ReleasedFlow(replace(TINY, shallow_block_local=False))
    with pytest.raises(ValueError, match="of one frame, since this is a model of images; got 2 frames"):
        image(torch.zeros(2, 2, 4, 8), text, (2, 2))
