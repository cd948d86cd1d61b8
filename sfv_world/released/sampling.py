"""Drawing from a released model, frame by frame: the deep block with its text, then the shallow blocks of the frame.

A `DeepStream` knows nothing of shallow blocks and never waits for them; a `ShallowInverse` follows it, frame after frame.
Samples are noised tokens, which `clean` cleans. Guidance acts on the deep block only: guided frames are not draws from the density
that the model scores, and what is reported of them is their likelihood under the model without guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.decoding.frames import SHALLOW_TOLERANCE
from sfv_world.decoding.solver import SolverConfig, draft_tokens
from sfv_world.flow.affine import standard_normal_log_prob
from sfv_world.flow.shallow import Stage
from sfv_world.layers import Told, attention_without_plans
from sfv_world.released.model import ReleasedFlow
from sfv_world.released.solver import BlockState, BlockStream, Prediction, Solution, solve

SEQUENTIAL = SolverConfig(block=1)
"""Token by token: the definition that faster decoding is held against."""


class Report(NamedTuple):
    """What is known of a part of the flow, once it is decoded, of one frame."""

    log_prob: Float[Tensor, "b l"]
    """Its share of log p of every token given all before it, in raster order, in nats; without guidance, whatever was drawn."""
    sweeps: Int[Tensor, "b"]
    """Passes that each row took."""
    certificate: Float[Tensor, "b"]
    """max|z' - z| between the exact noise of what is returned and the noise asked for."""


class Drawn(NamedTuple):
    """A frame that the deep block has drawn or read, and what it says of it."""

    latents: Float[Tensor, "b l c"]
    """u, in raster order as all of it."""
    noise: Float[Tensor, "b l c"]
    """Its exact noise under the model without guidance."""
    features: Float[Tensor, "b l w"]
    """The deep block's, of the model without guidance."""
    report: Report
    """Of the deep block alone."""


@dataclass
class DeepState:
    """What the deep block has read of a video."""

    block: BlockState
    previous: Stage | None = None
    """The last frame in it, to draft from."""


class DeepStream:
    """The deep block over a video: noise -> latents u, one frame after the other.

    Args:
        flow: the model.
        text: states of the text encoder.
        grid: rows and columns of tokens in a frame.
        frames: the most frames that the video may have.
        unconditional: states of the prompt without its caption; needed for guidance.
        guidance: its weight w; 0 is none.
        decoding: how to decode.
        state: of a stream like this one, which goes on with it; none: a video begins. One that was guided may go on without.

    Raises:
        ValueError: if guidance lacks the unconditional text.
    """

    @torch.no_grad()
    def __init__(
        self,
        flow: ReleasedFlow,
        text: Float[Tensor, "b k e"],
        grid: tuple[int, int],
        frames: int,
        *,
        unconditional: Float[Tensor, "b k e"] | None = None,
        guidance: float = 0.0,
        decoding: SolverConfig = SEQUENTIAL,
        state: DeepState | None = None,
    ):
        turn, read = flow.turn(frames, grid, True, text.device), None if state is None else state.block
        both = text
        if read is None and guidance and unconditional is not None:
            both = torch.cat([text, unconditional])
        elif guidance and (read is None or read.copies == 1):
            raise ValueError(f"guidance {guidance} needs the states of the unconditional text, got none")
        self.flow, self.decoding = flow, decoding
        self.block = BlockStream(flow.block(-1), len(text), turn, both, guidance, read)
        self.state = state or DeepState(self.block.state)

    @torch.no_grad()
    def read(self, latents: Float[Tensor, "b t l c"]) -> Drawn:
        """Takes frames as given, the next ones follow them; what is said is of the last one."""
        for u in self.flow.orient(-1, latents).unbind(1):
            found = self.block.read(u)
            self.state.previous = Stage(u, found.fields)
        once = torch.ones(len(u), dtype=torch.long, device=u.device)
        return self._drawn(u, found, once, torch.zeros_like(u[:, 0, 0]))

    @torch.no_grad()
    def draw(self, noise: Float[Tensor, "b l c"]) -> Drawn:
        """The next frame, by the noise asked for."""
        z = self.flow.orient(-1, noise)
        draft = first_draft(z, self.state.previous, self.decoding)
        found = solve(self.block, z, draft, self.decoding, self.decoding.tolerance)
        self.state.previous = Stage(found.tokens, found.fields)
        return self._drawn(found.tokens, found, found.sweeps, found.certificate)

    def _drawn(self, tokens: Tensor, found: Prediction | Solution, sweeps: Tensor, certificate: Tensor) -> Drawn:
        exact, log_det = found.conditional.normalise(tokens)
        log_prob = by_place(self.flow, -1, standard_normal_log_prob(exact) + log_det)
        latents, noise, features = (self.flow.orient(-1, x) for x in (tokens, exact, found.features))
        return Drawn(latents, noise, features, Report(log_prob, sweeps, certificate))


class ShallowInverse:
    """The shallow blocks, inverted frame by frame: latents u -> noised tokens.

    Solved to the rounding of float32, whatever tolerance and sweep limit the deep block has: the latents that the deep block
    evaluated are then the frame's own, and so is what it said of them.
    """

    @torch.no_grad()
    def __init__(
        self,
        flow: ReleasedFlow,
        grid: tuple[int, int],
        decoding: SolverConfig = SEQUENTIAL,
        previous: dict[int, Stage] | None = None,
    ):
        self.flow, self.decoding, self.grid = flow, replace(decoding, max_sweeps=None), grid
        self.tolerance = min(decoding.tolerance, SHALLOW_TOLERANCE)
        self.previous = dict(previous or {})

    @torch.no_grad()
    def __call__(self, latents: Float[Tensor, "b l c"]) -> tuple[Float[Tensor, "b l c"], Report]:
        """The noised tokens of the next frame, and the shallow blocks' report on them."""
        flow, rows = self.flow, len(latents)
        turn = flow.turn(1, self.grid, False, latents.device)
        none = torch.zeros(rows, dtype=torch.long, device=latents.device)
        report = Report(torch.zeros_like(latents[..., 0]), none, latents.new_zeros(rows))
        for index in reversed(range(len(flow.blocks) - 1)):
            z = flow.orient(index, latents)
            draft = first_draft(z, self.previous.get(index), self.decoding)
            found = solve(BlockStream(flow.block(index), rows, turn), z, draft, self.decoding, self.tolerance)
            self.previous[index] = Stage(found.tokens, found.fields)
            log_det = by_place(flow, index, -found.fields.sigma.log().sum(-1))
            report = join(report, Report(log_det, found.sweeps, found.certificate))
            latents = flow.orient(index, found.tokens)
        return latents, report


def join(part: Report, other: Report) -> Report:
    """The report of both parts."""
    certificate = torch.maximum(part.certificate, other.certificate)
    return Report(part.log_prob + other.log_prob, part.sweeps + other.sweeps, certificate)


def first_draft(noise: Float[Tensor, "b l c"], previous: Stage | None, decoding: SolverConfig) -> Tensor:
    """Where sweeps start: from the frame before, or from the fields mu = 0, sigma = 1 where there is none."""
    return noise if previous is None else draft_tokens(noise, previous, decoding.draft)


def by_place(flow: ReleasedFlow, index: int, values: Float[Tensor, "b l"]) -> Float[Tensor, "b l"]:
    """Values by token of block `index`, in raster order."""
    return flow.orient(index, values[..., None])[..., 0]


class Sample(NamedTuple):
    """Videos of noised tokens, and what is known of the frames that were drawn."""

    tokens: Float[Tensor, "b t l c"]
    """The frames continued, if any, and those drawn."""
    log_prob: Float[Tensor, "b drawn l"]
    """log p of every token drawn given all before it, in nats, under the model without guidance."""
    guided: bool
    """Whether guidance acted: these are then no draws from that density."""
    sweeps: Int[Tensor, "b drawn"]
    """Passes of the deep block by frame."""
    certificate: Float[Tensor, "b drawn"]
    """max|z' - z| by frame, of the deep and the shallow blocks; above the tolerance where the sweep limit was hit."""


@torch.no_grad()
@attention_without_plans()
def sample(
    flow: ReleasedFlow,
    noise: Float[Tensor, "b t l c"],
    text: Float[Tensor, "b k e"],
    grid: tuple[int, int],
    *,
    unconditional: Float[Tensor, "b k e"] | None = None,
    guidance: float = 0.0,
    first: Float[Tensor, "b j l c"] | None = None,
    decoding: SolverConfig = SEQUENTIAL,
) -> Sample:
    """Videos of noised tokens from standard normal noise.

    Args:
        flow: the model.
        noise: of the frames to draw.
        text: states of the text encoder.
        grid: rows and columns of tokens in a frame.
        unconditional: states of the prompt without its caption; needed for guidance.
        guidance: its weight w; 0 is none.
        first: noised tokens of frames that come before and are continued; they begin the result.
        decoding: sequential, or in blocks of tokens by Jacobi sweeps; its temperature is not applied to the noise given.

    Raises:
        ValueError: if shapes do not fit, or guidance lacks the unconditional text.
    """
    flow.check(noise, text, grid)
    if unconditional is not None:
        flow.check(noise, unconditional, grid)
    if first is not None and not flow.config.shallow_block_local:
        raise ValueError("first must be None, since this is a model of images; got frames to continue")
    frames = noise.shape[1] + (0 if first is None else first.shape[1])
    deep = DeepStream(flow, text, grid, frames, unconditional=unconditional, guidance=guidance, decoding=decoding)
    shallow = ShallowInverse(flow, grid, decoding)
    if first is not None:
        deep.read(flow(first, text, grid).latents)
    drawn, reports, sweeps = [], [], []
    for z in noise.unbind(1):
        found = deep.draw(z)
        tokens, more = shallow(found.latents)
        drawn.append(tokens)
        reports.append(join(found.report, more))
        sweeps.append(found.report.sweeps)
    return Sample(
        tokens=torch.cat([*([] if first is None else [first]), torch.stack(drawn, dim=1)], dim=1),
        log_prob=torch.stack([report.log_prob for report in reports], dim=1),
        guided=bool(guidance),
        sweeps=torch.stack(sweeps, dim=1),
        certificate=torch.stack([report.certificate for report in reports], dim=1),
    )


def clean(
    flow: ReleasedFlow,
    tokens: Float[Tensor, "b t l c"],
    text: Float[Tensor, "b k e"],
    grid: tuple[int, int],
    noise: float,
    told: Sequence[Told] = (),
) -> Float[Tensor, "b t l c"]:
    """Tokens without their noise: by the model's denoiser, or where it has none by its own score, x + sigma^2 grad log p(x).

    Args:
        flow: the model.
        tokens: whole videos of noised tokens.
        text: states of the text encoder.
        grid: rows and columns of tokens in a frame.
        noise: standard deviation of the noise of training.
        told: what a control adapter adds to the deep block, whose score then tells of the controls too.
    """
    if flow.learnable_self_denoiser is not None:
        with torch.no_grad():
            return flow.denoise(tokens, text, grid)
    with torch.inference_mode(False), torch.enable_grad():
        x = tokens.detach().clone().requires_grad_()
        (score,) = torch.autograd.grad(flow(x, text.clone(), grid, told).log_prob.sum(), x)
    return tokens + noise**2 * score
