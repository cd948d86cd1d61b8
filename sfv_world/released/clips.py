"""Clips of a released model, from noise to frames: deep flow, shallow flow, denoiser and codec, in chunks.

The released models see a fixed number of latent frames. A longer clip restarts: the last latents of a chunk are read again as
the first of the next one, which the model knows from training with first frames dropped (STARFlow-V, arXiv 2511.20462). The
deep flow runs ahead; shallow blocks follow it frame by frame, denoiser and codec chunk by chunk, since through its layers the
released denoiser sees nearly all of a chunk.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from sfv_world.codec.vae import ImageCodec, Memory, WanCodec, to_frames
from sfv_world.decoding.solver import SolverConfig
from sfv_world.given import check_number, check_seed
from sfv_world.layers import attention_without_plans
from sfv_world.released.model import ReleasedFlow
from sfv_world.released.pipeline import Follower
from sfv_world.released.sampling import DeepStream, Report, ShallowInverse, clean, join


@dataclass(frozen=True)
class ClipConfig:
    """How clips are drawn."""

    noise: float | None = None
    """Standard deviation of the noise on latents in training; none: 0.5 for videos, 0.3 for images."""
    guidance: float = 0.0
    """Weight of guidance by the unconditional prompt; 0 is none."""
    chunk: int = 21
    """Latent frames that the model sees at once, as in training."""
    context: int = 5
    """Latent frames of a chunk that the next one begins with."""
    decoding: SolverConfig = field(default_factory=lambda: SolverConfig(block=64))
    """How the flow is inverted."""
    seed: int = 0
    """Of all noise; the same on every device."""

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if not 1 <= self.context < self.chunk:
            raise ValueError(
                f"context: expected at least 1 latent frame and fewer than the chunk's {self.chunk}, got {self.context}."
            )
        if self.noise is not None:
            check_number("noise", self.noise, "a positive number", math.ulp(0.0))
        check_number("guidance", self.guidance, "at least 0", 0.0)
        if type(self.decoding) is not SolverConfig or self.decoding.draft == "learned":
            raise ValueError(
                "decoding: expected a SolverConfig without the draft 'learned' for a clip of a released model, which is always "
                f"cleaned and guided by its prompt, got {self.decoding}."
            )


class Clip(NamedTuple):
    """Clips, and what is known of the latent frames that were drawn."""

    frames: UInt8[Tensor, "b n h w 3"]
    """From the start frames on, on the CPU."""
    tokens: Float[Tensor, "b t l c"]
    """The noised tokens of all latent frames, on the CPU."""
    log_prob: Float[Tensor, "b drawn l"]
    """log p of every token drawn given those its chunk has before it, in nats, under the model without guidance."""
    sweeps: Int[Tensor, "b drawn"]
    """Passes of the deep block by latent frame."""
    certificate: Float[Tensor, "b drawn"]
    """max|z' - z| by latent frame; above the tolerance where the sweep limit was hit."""
    guided: bool
    """Whether guidance acted: the clips are then no draws from the density that the likelihood is of."""


@torch.no_grad()
@attention_without_plans()
def draw_clips(
    flow: ReleasedFlow,
    codec: WanCodec | ImageCodec,
    text: Float[Tensor, "b k e"],
    grid: tuple[int, int],
    latent_frames: int,
    config: ClipConfig,
    *,
    unconditional: Float[Tensor, "b k e"] | None = None,
    start: Float[Tensor, "b j c h w"] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Clip:
    """Draws clips, one a row of `text`.

    Args:
        flow: the model.
        codec: of its latents.
        text: states of the text encoder.
        grid: rows and columns of tokens in a frame.
        latent_frames: length of the clips, start frames included.
        config: how.
        unconditional: states of the prompt without its caption; needed for guidance.
        start: clean latents of the first frames; none: all frames are drawn.
        progress: called with "drawn", in the deep flow, and "decoded", to frames, after every latent frame.

    Raises:
        ValueError: if shapes do not fit each other or the model.
    """
    rows, size, channels, device = len(text), grid[0] * grid[1], flow.config.token_channels, text.device
    given = 0 if start is None else start.shape[1]
    flow.check(text.new_zeros(rows, 1, size, channels), text, grid)
    if not flow.config.shallow_block_local and latent_frames != 1:
        raise ValueError(f"latent_frames: expected 1, since this is a model of images, got {latent_frames}.")
    if not given < min(latent_frames, config.chunk):
        raise ValueError(
            f"start: expected fewer latent frames than the clip's {latent_frames} and the chunk's {config.chunk}, got {given}."
        )
    generator = torch.Generator().manual_seed(config.seed)

    def normal(frames: int) -> Tensor:
        noise = [torch.randn(rows, size, channels, generator=generator) for _ in range(frames)]
        return torch.stack(noise, dim=1).to(device)

    finisher, latents, said = Finisher(flow, codec, text, grid, config, progress), [], []
    with Follower(device, runs_ahead(flow)) as follower:
        if start is not None:
            begin = flow.tokens(start)
            noised = begin + finisher.noise * normal(given)
            latents += flow(noised, text, grid).latents.unbind(1)
            follower.submit(finisher.begin, begin, noised)
        while len(latents) < latent_frames:
            known = latents[:] if len(latents) == given else latents[-config.context :]
            new = min(config.chunk - len(known), latent_frames - len(latents))
            deep = DeepStream(
                flow, text, grid, len(known) + new, unconditional=unconditional, guidance=config.guidance,
                decoding=config.decoding,
            )  # fmt: skip
            if known:
                deep.read(torch.stack(known, dim=1))
            for noise in (config.decoding.temperature * normal(new)).unbind(1):
                drawn = deep.draw(noise)
                latents.append(drawn.latents)
                said.append(drawn.report)
                progress("drawn")
                follower.submit(finisher.invert, drawn.latents)
            follower.submit(partial(finisher.finish, len(known), new))
            del deep  # its keys and values, before there are those of the next chunk
    reports = [join(deep_part, shallow_part) for deep_part, shallow_part in zip(said, finisher.reports, strict=True)]
    return Clip(
        frames=torch.cat(finisher.frames, dim=1),
        tokens=torch.stack(finisher.tokens, dim=1).cpu(),
        log_prob=torch.stack([report.log_prob for report in reports], dim=1).cpu(),
        sweeps=torch.stack([report.sweeps for report in said], dim=1).cpu(),
        certificate=torch.stack([report.certificate for report in reports], dim=1).cpu(),
        guided=bool(config.guidance),
    )


def runs_ahead(flow: ReleasedFlow) -> bool:
    """Whether the deep flow may go on while a chunk is cleaned.

    Not where processes share it and its own score cleans, which needs the same layers: two threads would gather their shards, in
    another order on every process.
    """
    shared = any(isinstance(layer, FSDPModule) for layer in flow.block(-1).attn_blocks)
    return flow.learnable_self_denoiser is not None or not shared


class Finisher:
    """What follows the deep flow: latents u -> noised tokens, frame by frame; tokens -> frames, chunk by chunk."""

    def __init__(
        self,
        flow: ReleasedFlow,
        codec: WanCodec | ImageCodec,
        text: Float[Tensor, "b k e"],
        grid: tuple[int, int],
        config: ClipConfig,
        progress: Callable[[str], None],
    ):
        self.flow, self.codec, self.text, self.grid = flow, codec, text, grid
        self.noise = flow.config.noise if config.noise is None else config.noise
        self.shallow, self.memory, self.progress = ShallowInverse(flow, grid, config.decoding), Memory(), progress
        self.tokens: list[Tensor] = []
        self.reports: list[Report] = []
        self.frames: list[Tensor] = []

    def begin(self, tokens: Float[Tensor, "b j l c"], noised: Float[Tensor, "b j l c"]) -> None:
        """Takes frames that are given; they are shown as they are, through the codec."""
        self.tokens += noised.unbind(1)
        self.show(tokens)

    def invert(self, latents: Float[Tensor, "b l c"]) -> None:
        """Takes the deep flow's next frame."""
        tokens, report = self.shallow(latents)
        self.tokens.append(tokens)
        self.reports.append(report)

    def finish(self, known: int, new: int) -> None:
        """Cleans and shows the last `new` frames, of a chunk that began with `known` others."""
        chunk = torch.stack(self.tokens[-(known + new) :], dim=1)
        self.show(clean(self.flow, chunk, self.text, self.grid, self.noise)[:, known:])

    def show(self, tokens: Float[Tensor, "b t l c"]) -> None:
        """Clean tokens -> frames on the CPU, one latent frame after the other."""
        for latent in self.flow.latents(tokens, self.grid).split(1, dim=1):
            self.frames.append(to_frames(self.codec.decode(latent, self.memory)).cpu())
            self.progress("decoded")
