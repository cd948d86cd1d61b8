"""Frame by frame: the flow as a stream, imagining the next frame or reading an observed one.

The state between frames is the deep flow's cache and what each map that is inverted by sweeps did to the last frame. Reading
(`read_frame`) and imagining (`imagine_frame`) advance it in the same way; a parallel pass over a video (`read_video`) ends in
the same state.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.decoding.solver import DecodingConfig, Draft, draft_tokens, solve
from sfv_world.flow.affine import Fields, guide, standard_normal_log_prob
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.model import VideoFlow
from sfv_world.flow.shallow import BandFlow, RasterFlow, Stage

DEEP_SHARE = 0.5
"""Tolerance of the autoregressive deep flow, in units of the frame's."""
SHALLOW_SHARE = 0.3
"""Tolerance of the shallow blocks where the deep flow does not read their latents, in units of the frame's."""
SHALLOW_TOLERANCE = 1e-5
"""Their tolerance where it does: the fields it evaluated before them are then the frame's own."""
TIGHTER = 0.01
"""Rows whose frame misses its tolerance are solved on, this much tighter each time."""
ATTEMPTS = 3


@dataclass
class StreamState:
    """All that the next frame depends on. `imagine_frame` and `read_frame` use it up: copy rows first to keep it."""

    cache: FrameCache
    """The deep flow's keys and values of the last W frames."""
    tokens: Float[Tensor, "b l c"]
    """Last frame's noised tokens."""
    stages: list[Stage]
    """What each map that is solved by sweeps did to the last frame: the autoregressive deep flow, then raster blocks."""

    @property
    def clock(self) -> int:
        """Number of the next frame in the ring's time, which all rows share."""
        return self.cache.clock

    def rows(self, rows: Int[Tensor, "n"]) -> "StreamState":
        """A copy of the given rows (selected, repeated, reordered)."""
        stages = [Stage(tokens[rows], Fields(mu[rows], sigma[rows])) for tokens, (mu, sigma) in self.stages]
        return StreamState(self.cache.rows(rows), self.tokens[rows], stages)

    def put(self, rows: Int[Tensor, "n"], other: "StreamState") -> None:
        """Replaces the given rows by those of `other`, a state of the same clock."""
        self.cache.put(rows, other.cache)
        self.tokens = self.tokens.index_put((rows,), other.tokens)  # a new one: whoever gave it may read it still
        for mine, theirs in zip(self.stages, other.stages, strict=True):
            for old, new in zip((mine.tokens, *mine.fields), (theirs.tokens, *theirs.fields), strict=True):
                old[rows] = new

    def tensors(self) -> dict[str, Tensor]:
        """All of it but its clock, by name."""
        cache = self.cache
        tensors = {"keys": cache.keys, "values": cache.values, "visible": cache.visible, "tokens": self.tokens}
        for index, stage in enumerate(self.stages):
            tensors |= stage.tensors(str(index))
        return tensors

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], clock: int) -> "StreamState":
        """The one whose `tensors` are among these."""
        cache = FrameCache(tensors["keys"], tensors["values"], tensors["visible"], clock)
        count = sum(name.endswith(".mu") for name in tensors)
        return cls(cache, tensors["tokens"], [Stage.of(tensors, str(index)) for index in range(count)])


class FrameReport(NamedTuple):
    """What is known of a frame once it is decoded or read."""

    log_prob: Float[Tensor, "b l"]
    """log p of every token given all before it, in nats."""
    noise: Float[Tensor, "b l c"]
    """Its exact noise."""
    features: Float[Tensor, "b l w"]
    """The deep flow's features of its slots."""
    sweeps: Int[Tensor, "b"]
    """Passes of the deep flow spent on it."""
    shallow_sweeps: Int[Tensor, "b"]
    """Passes of shallow blocks spent on it, all blocks together, the final check included."""
    certificate: Float[Tensor, "b"]
    """max|z' - z| between its exact noise and the noise asked for; 0 for a frame that was read."""

    @classmethod
    def of_read(
        cls, flow: VideoFlow, fields: Fields, latents: Tensor, log_det: Tensor, features: Tensor
    ) -> "FrameReport":
        """The report of frames that were read, in one pass of every block."""
        noise, deep_log_det = fields.normalise(latents)
        log_prob = standard_normal_log_prob(noise) + log_det + deep_log_det
        ones = torch.ones(len(noise), dtype=torch.long, device=noise.device)
        return cls(log_prob, noise, features, ones, ones * len(flow.shallow.blocks), torch.zeros_like(log_prob[:, 0]))


def read_video(
    flow: VideoFlow,
    tokens: Float[Tensor, "b t l c"],
    controls: Float[Tensor, "b t k d"] | None,
    clock: int | None = None,
    *,
    report: bool = True,
) -> tuple[StreamState, FrameReport | None]:
    """Reads videos that begin here in one parallel pass.

    Args:
        flow: the flow.
        tokens: noised tokens.
        controls: control tokens of what led to each frame.
        clock: number of the frame that comes next; none: the number of frames read.
        report: whether to report the last frame; where the deep flow needs no latents, this takes a pass of the shallow flow.
    """
    frames, last = tokens.shape[1], tokens[:, -1].clone()
    cache = flow.deep.new_cache(len(tokens), frames if clock is None else clock)
    if flow.config.kind == "frame-parallel":
        condition = features = flow.deep.features(flow.deep.shift(tokens), controls, cache=cache)[:, -1]
    else:
        features, condition = flow(tokens, controls, cache).features[:, -1], None
    for back in range(1, min(frames, cache.window) + 1):
        cache.visible[:, (cache.clock - back) % cache.window] = True
    state = StreamState(cache, last, [])
    if not report and condition is not None and isinstance(flow.shallow, BandFlow):
        return state, None
    latents, log_det, shallow = flow.shallow(last, condition)
    fields = flow.deep.fields(features)
    state.stages = _stages(flow, Stage(latents, fields), shallow)
    return state, FrameReport.of_read(flow, fields, latents, log_det, features)


def read_frame(
    flow: VideoFlow, state: StreamState, tokens: Float[Tensor, "b l c"], controls: Float[Tensor, "b k d"] | None
) -> FrameReport:
    """Reads the next frame of a stream and advances `state` in place."""
    if flow.config.kind == "frame-parallel":
        features, fields = _predict(flow, state, controls)
        latents, log_det, shallow = flow.shallow(tokens, features)
    else:
        latents, log_det, shallow = flow.shallow(tokens)
        features, fields = _read_latents(flow, state, latents, controls)
    _advance(state, tokens, _stages(flow, Stage(latents, fields), shallow))
    return FrameReport.of_read(flow, fields, latents, log_det, features)


def imagine_frame(
    flow: VideoFlow,
    state: StreamState,
    noise: Float[Tensor, "b l c"],
    controls: Float[Tensor, "b k d"] | None,
    config: DecodingConfig,
    unguided: Float[Tensor, "b k d"] | None = None,
) -> FrameReport:
    """Decodes the next frame of a stream from its noise and advances `state` in place, whose `tokens` it then is.

    The report is that of the frame itself: log-likelihood and noise are those of what is returned under the unguided
    model, whatever the solver left open and whatever guidance did; the certificate compares with what was asked for.

    Args:
        flow: the flow.
        state: the stream; used up and moved on.
        noise: of the frame.
        controls: control tokens of what leads to it.
        config: how to decode.
        unguided: control tokens to guide away from, where `config.guidance` is not 0.
    """
    check_decoding(flow, config)
    if not config.guidance:
        unguided = None
    if flow.config.kind == "frame-parallel":
        without = None if unguided is None else _predict(flow, state, unguided)[1]
        features, fields = _predict(flow, state, controls)  # the last pass: the cache keeps its keys and values
        drawn = _guided(fields, without, config)
        latents, sweeps = drawn.denormalise(noise), torch.ones_like(noise[:, 0, 0]).long()
        condition, previous = features, state.stages
    else:
        deep, *previous = state.stages
        solution = solve(
            flow.deep,
            noise,
            flow.draft(noise, deep, controls) if config.draft == "learned" else draft_tokens(noise, deep, config.draft),
            state.cache,
            tolerance=DEEP_SHARE * config.tolerance,
            size=config.block,
            max_sweeps=config.max_sweeps,
            before=deep.tokens[:, -1:],
            controls=controls,
            unguided=unguided,
            guidance=config.guidance,
        )
        latents, sweeps, features = solution.tokens, solution.sweeps, solution.features
        fields, condition = flow.deep.fields(features), None
        drawn = _guided(fields, None if unguided is None else flow.deep.fields(solution.without), config)

    draft, loose = config.draft, SHALLOW_SHARE * config.tolerance
    tolerance = torch.full_like(noise[:, 0, 0], min(loose, SHALLOW_TOLERANCE) if condition is None else loose)
    shallow_sweeps = torch.zeros_like(sweeps)
    for attempt in range(1, ATTEMPTS + 1):
        if isinstance(flow.shallow, BandFlow):  # exact after one pass a band
            tokens, found, log_det = flow.shallow.decode(latents, condition)
            taken, shallow = torch.full_like(sweeps, flow.shallow.passes), []
        else:
            tokens, taken = _invert_raster(flow.shallow, latents, previous, condition, config, draft, tolerance)
            found, log_det, shallow = flow.shallow(tokens, condition)
        if condition is None and config.max_sweeps is not None:
            # Shallow blocks that stopped short leave other latents than those solved for, and those are the frame's.
            without = None if unguided is None else _read_latents(flow, state, found, unguided)[1]
            features, fields = _read_latents(flow, state, found, controls)
            drawn, sweeps = _guided(fields, without, config), sweeps + 1
        exact, deep_log_det = fields.normalise(found)
        asked = exact if drawn is fields else drawn.normalise(found)[0]
        certificate = (asked - noise).abs().amax(dim=(1, 2))
        missed = ~(certificate <= config.tolerance)
        shallow_sweeps += taken + len(shallow)
        settled = isinstance(flow.shallow, BandFlow) or config.block == 1 or config.max_sweeps is not None
        if attempt == ATTEMPTS or settled or not missed.any():
            break
        # Rows that are good enough start from their own answer with any tolerance: they stay as they are, bit for bit.
        tolerance = torch.where(missed, TIGHTER * tolerance, torch.inf)
        previous, draft = shallow, "tokens"
    _advance(state, tokens, _stages(flow, Stage(found, fields), shallow))
    log_prob = standard_normal_log_prob(exact) + log_det + deep_log_det
    if unguided is not None:  # every pass with the action goes with one without
        sweeps = 2 * sweeps
    return FrameReport(log_prob, exact, features, sweeps, shallow_sweeps, certificate)


def check_decoding(flow: VideoFlow, config: DecodingConfig) -> None:
    """Raises a ValueError if the flow has not what is asked for."""
    if config.draft == "learned" and flow.drafter is None:
        raise ValueError(
            "draft: expected 'fields', 'tokens', 'noise' or 'zeros' for a flow without a draft network, got 'learned'. "
            "Autoregressive worlds train one along (`sfv-world train --kind autoregressive`)."
        )


def _invert_raster(
    flow: RasterFlow,
    latents: Tensor,
    previous: list[Stage],
    condition: Tensor | None,
    config: DecodingConfig,
    draft: Draft,
    tolerance: Tensor,
) -> tuple[Tensor, Tensor]:
    """latents -> (tokens, sweeps): the blocks of a raster flow inverted, last one first."""
    sweeps = torch.zeros(len(latents), dtype=torch.long, device=latents.device)
    for index in reversed(range(len(previous))):
        block, noise = flow.block(index), flow.orient(index, latents)
        solution = solve(
            block,
            noise,
            draft_tokens(noise, previous[index], draft),
            block.new_cache(len(noise)) if config.block else None,
            tolerance=tolerance,
            size=config.block,
            max_sweeps=config.max_sweeps,
            before=block.sos_embed.expand(len(noise), -1, -1),
            condition=None if condition is None else flow.orient(index, condition),
        )
        latents = flow.orient(index, solution.tokens)
        sweeps += solution.sweeps
    return latents, sweeps


def _guided(fields: Fields, without: Fields | None, config: DecodingConfig) -> Fields:
    """What a frame is drawn from: the fields told of the action, moved away from those that were not, if there are such."""
    return fields if without is None else guide(fields, without, config.guidance)


def _predict(flow: VideoFlow, state: StreamState, controls: Tensor | None) -> tuple[Tensor, Fields]:
    """The frame-parallel deep flow's one pass: features and fields of the frame to come."""
    features = flow.deep.decode(state.tokens, state.cache, controls=controls)
    return features, flow.deep.fields(features)


def _read_latents(
    flow: VideoFlow, state: StreamState, latents: Tensor, controls: Tensor | None
) -> tuple[Tensor, Fields]:
    """The autoregressive deep flow's pass over known latents: features and fields of their frame."""
    carried = torch.cat([state.stages[0].tokens[:, -1:], latents[:, :-1]], dim=1)
    features = flow.deep.decode(carried, state.cache, controls=controls)
    return features, flow.deep.fields(features)


def _stages(flow: VideoFlow, deep: Stage, shallow: list[Stage]) -> list[Stage]:
    return [deep, *shallow] if flow.config.kind == "autoregressive" else shallow


def _advance(state: StreamState, tokens: Tensor, stages: list[Stage]) -> None:
    state.cache.advance()
    state.tokens, state.stages = tokens, stages
