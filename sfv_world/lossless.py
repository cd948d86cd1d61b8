"""What a world's frames cost without loss: bits that mean the same for worlds of pixels and of latents.

By bits-back coding (arXiv 1901.04866): a frame x is sent as its noised signal s, under the world's density, and what x is
beside what the world shows of s; the choice of the noise carries -log2 q(s | x) bits of something else, which come back. On average
that is a bound on -log2 p(x | frames before it, actions) for the uint8 frame itself.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from sfv_world.data.clips import Clips, Episodes
from sfv_world.denoiser import video_score
from sfv_world.film import long_clips
from sfv_world.training.objective import Batch
from sfv_world.world import World

LENGTH = 16
"""Frames of a clip; those of the second half count."""


class Cost(NamedTuple):
    """Of frames that have half a clip before them."""

    signal: Float[torch.Tensor, "n"]
    """-log p(s) of their noised signals, in nats a frame."""
    returned: Float[torch.Tensor, "n"]
    """-log q(s | x), in nats a frame."""
    residual: Int[torch.Tensor, "n h w 3"]
    """What the frames are beside what is shown of their signals, -255 to 255."""


def lossless(world: World, train: Episodes, held_out: Episodes, clips: int, seed: int) -> dict[str, float]:
    """Bits per colour value of held-out frames, all told, and the part of it that is the residual's.

    A residual costs what a histogram says that was fitted to training frames.
    """
    fitted, found = (_cost(world, long_clips(part, clips, LENGTH, seed), seed) for part in (train, held_out))
    counts = torch.bincount(fitted.residual.flatten() + 255, minlength=511) + 1
    residual = -(counts / counts.sum()).log()[found.residual + 255].mean().item()
    signal = (found.signal - found.returned).mean().item() / found.residual[0].numel()
    return {
        "bits_per_colour_value": (signal + residual) / math.log(2),
        "of_the_residual": residual / math.log(2),
        "frames": len(found.signal),
    }


@torch.no_grad()
def _cost(world: World, clips: Clips, seed: int) -> Cost:
    """What frames of clips cost, shown as the causal denoiser leaves them where there is one."""
    model, batch, parts = world.model, Batch.from_clips(clips, world.model), []
    generator = torch.Generator().manual_seed(seed)
    for rows in np.array_split(np.arange(len(clips.frames)), math.ceil(len(clips.frames) / 8)):
        frames, known = batch.frames[rows], batch.known[rows]
        uniform = torch.rand(frames.shape, generator=generator)
        normal = torch.randn((*frames.shape[:2], *model.config.codec.signal), generator=generator)
        tokens = model.noised_tokens(frames, uniform.to(world.device), normal.to(world.device))
        reading = model(tokens, batch.actions[rows], known)
        signal, clean = model.codec.decode(tokens), tokens
        if model.denoiser:
            score = video_score(model.denoiser, tokens, reading.encoding.features, torch.zeros_like(known))
            clean = tokens + model.token_noise * score
        cost = (
            -reading.log_likelihood,
            -model.codec.noise_log_density(signal, frames, model.config.noise),
            frames.long() - model.codec.frames(model.codec.decode(clean)),
        )
        parts.append([part[:, LENGTH // 2 :].flatten(0, 1).cpu() for part in cost])
    return Cost(*(torch.cat(part) for part in zip(*parts, strict=True)))
