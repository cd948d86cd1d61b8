"""The world model: codec, control encoder, video flow and outcome heads, as one set of weights.

What is learned, without any of the loops around it: `training` fits it, `world` steps it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sfv_world.codec.latent import AutoencoderConfig, LatentCodec, LatentCodecConfig
from sfv_world.codec.pixels import PixelCodec, PixelCodecConfig
from sfv_world.codec.tokens import Codec
from sfv_world.control.encoder import ControlEncoder
from sfv_world.control.spaces import action_size
from sfv_world.decoding.frames import (
    FrameReport,
    StreamState,
    check_decoding,
    imagine_frame,
    read_frame,
    read_video,
)
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.denoiser import Denoiser, Seen
from sfv_world.flow.model import DeepKind, Encoding, FlowConfig, VideoFlow
from sfv_world.flow.transformer import TransformerConfig
from sfv_world.heads import Outcome, OutcomeHeads
from sfv_world.layers import Layer


@dataclass(frozen=True)
class ModelConfig:
    """Everything that decides which weights a world has."""

    codec: PixelCodecConfig | LatentCodecConfig
    """Frames to tokens."""
    flow: FlowConfig
    """The density."""
    noise: float = 0.05
    """Standard deviation of the noise added to the codec's signal: pixels in [-1, 1], or latents of variance 1. The density is
    over the noised signal."""
    control_tokens: int = 4
    """Control tokens a frame."""
    denoiser: TransformerConfig | None = None
    """The network that cleans frames; none: they are shown with their noise."""

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ValueError(
                f"noise: expected more than 0, for frames without noise have no density, got {self.noise}."
            )
        expected = (self.codec.channels, self.codec.grid)
        if (self.flow.channels, self.flow.grid) != expected:
            raise ValueError(
                f"flow: expected (channels, grid) {expected} as the codec has, got {(self.flow.channels, self.flow.grid)}."
            )

    @property
    def dimensions(self) -> int:
        """Dimensions of the density of a frame: height x width x 3, or the latents of a frame."""
        return math.prod(self.codec.signal)


class Reading(NamedTuple):
    """What the model says of a video it has read in parallel."""

    encoding: Encoding
    log_likelihood: Float[Tensor, "b t"]
    """log p(noised signal of the frame | frames before it, actions), in nats per frame, every constant included."""
    outcome: Outcome
    draft_error: Float[Tensor, "b s l"] | None
    """How far learned drafts were off (`VideoFlow.draft_error`), where there are any and the model is in training."""


class WorldModel(nn.Module):
    """All weights of a world."""

    decoding = DecodingConfig()
    """How such a world is decoded if nothing else is said."""

    def __init__(self, config: ModelConfig, action_space: gym.Space[Any]):
        super().__init__()
        self.config, self.action_space = config, action_space
        self.codec: Codec
        if isinstance(config.codec, LatentCodecConfig):
            self.codec = LatentCodec(config.codec)
        else:
            self.codec = PixelCodec(config.codec)
        self.controls = ControlEncoder(action_size(action_space), config.flow.control_width, config.control_tokens)
        self.flow = VideoFlow(config.flow)
        self.heads = OutcomeHeads(config.flow.deep.width, queries=4 if config.flow.kind == "frame-parallel" else 0)
        self.denoiser: Denoiser | None = None
        if config.denoiser:
            width = config.flow.deep.width
            self.denoiser = Denoiser(
                config.denoiser, channels=config.flow.channels, grid=config.flow.grid, features=width
            )

    def compute_in(self, dtype: torch.dtype) -> "WorldModel":
        """Casts the Transformers' layers; projections, norms at the end, affine algebra and heads stay in float32."""
        for module in self.modules():
            if isinstance(module, Layer):
                module.to(dtype)
        return self

    @property
    def midstream(self) -> range:
        """Numbers of the frames of a clip that are read after as many as the frames far into a rollout are."""
        window = self.config.flow.deep.window
        return range(window, 2 * window + 2)

    @property
    def memory(self) -> str:
        """What of the past it reads, in words."""
        return f"window of {self.config.flow.deep.window} frames"

    def row_size(self, frames: int, decoding: DecodingConfig) -> float:
        """About the bytes that it takes to begin a row at so many frames: its keys and values, and what reading computes with."""
        deep, pixels = self.config.flow.deep, 3 * self.config.codec.height * self.config.codec.width
        slots = self.flow.deep.slots * deep.width
        return 4.0 * (2 * deep.depth * deep.window * slots + frames * (20 * slots + 6 * pixels))

    @property
    def token_noise(self) -> Float[Tensor, "c"]:
        """Standard deviation of the noise in every channel of a token."""
        return self.config.noise / self.codec.scale

    def noised_tokens(
        self,
        frames: UInt8[Tensor, "*b height width 3"],
        uniform: Float[Tensor, "*b height width 3"],
        normal: Float[Tensor, "*b h w k"],
    ) -> Float[Tensor, "*b l c"]:
        """Tokens of frames dequantised by `uniform` in [0, 1), their signal noised by `normal` ~ N(0, 1)."""
        return self.codec.encode(self.codec.signal(frames, uniform) + self.config.noise * normal)

    def forward(
        self,
        tokens: Float[Tensor, "b t l c"],
        actions: Float[Tensor, "b t n"],
        known: Bool[Tensor, "b t"],
        heads_apart: bool = False,
        **options: Any,
    ) -> Reading:
        """Reads videos that begin here in one parallel pass.

        Args:
            tokens: noised tokens.
            actions: vector of the action that led to each frame.
            known: whether that action is known; a video's first frame has none.
            heads_apart: whether gradients of the outcome stay within the heads.
            options: `cache=` takes the deep flow's keys and values, `told=` is the past that it reads (see `VideoFlow.forward`).
        """
        controls = self.controls(actions, known)
        encoding = self.flow(tokens, controls, **options)
        log_likelihood = encoding.log_prob.sum(-1) + self.codec.log_det
        drafted = self.training and self.flow.drafter is not None and tokens.shape[1] > 1
        draft_error = self.flow.draft_error(encoding, controls) if drafted else None
        outcome = self.outcome(encoding.features.detach() if heads_apart else encoding.features)
        return Reading(encoding, log_likelihood, outcome, draft_error)

    def outcome(self, features: Float[Tensor, "*b l w"]) -> Outcome:
        """What came with frames, by the deep flow's features, as far as these were known before the frames.

        In token order, all but a frame's first slot have read some of it; that an ended game shows its last screen again
        would tell them its end.
        """
        return self.heads(features if self.config.flow.kind == "frame-parallel" else features[..., :1, :])

    # The same frame by frame, what `World` does with a model. A stream is used up.

    def read_video(
        self,
        frames: UInt8[Tensor, "b t height width 3"],
        uniform: Float[Tensor, "b t height width 3"],
        normal: Float[Tensor, "b t h w k"],
        controls: Float[Tensor, "b t n d"],
        clock: int | None = None,
        *,
        report: bool = True,
    ) -> tuple[StreamState, FrameReport | None]:
        """Reads videos that begin here; see `noised_tokens` and `decoding.frames.read_video`."""
        return read_video(self.flow, self.noised_tokens(frames, uniform, normal), controls, clock, report=report)

    @property
    def identity(self) -> ModelConfig:
        """What decides, with the weights, which world it is."""
        return self.config

    def check_reading(self, stream: StreamState) -> None:
        """Every stream can be read on."""

    def read_frame(
        self,
        stream: StreamState,
        frames: UInt8[Tensor, "b 1 height width 3"],
        uniform: Float[Tensor, "b 1 height width 3"],
        normal: Float[Tensor, "b 1 h w k"],
        controls: Float[Tensor, "b n d"],
        *,
        as_imagined: bool = False,
    ) -> FrameReport:
        """Reads the next frame; `show` shows it as an imagined one, whatever `as_imagined`."""
        return read_frame(self.flow, stream, self.noised_tokens(frames, uniform, normal)[:, 0], controls)

    def imagine_frame(
        self,
        stream: StreamState,
        noise: Float[Tensor, "b l c"],
        controls: Float[Tensor, "b n d"],
        decoding: DecodingConfig,
        unguided: Float[Tensor, "b n d"] | None = None,
    ) -> FrameReport:
        """Decodes the next frame from its noise."""
        return imagine_frame(self.flow, stream, noise, controls, decoding, unguided)

    def stream_of(self, tensors: Mapping[str, Tensor], clock: int) -> StreamState:
        """The stream whose `tensors` are among these, at its clock."""
        return StreamState.of(tensors, clock)

    def show(
        self, stream: StreamState, features: Float[Tensor, "b l w"], clean: bool
    ) -> UInt8[Tensor, "b height width 3"]:
        """The frame that was decoded last, with its noise or without."""
        tokens = self.cleaned(Seen(stream.tokens, features)) if clean else stream.tokens
        return self.codec.frames(self.codec.decode(tokens))

    def cleaned(
        self, frame: Seen, following: Seen | None = None, shown: Bool[Tensor, "b"] | None = None
    ) -> Float[Tensor, "b l c"]:
        """Clean tokens, by Tweedie's formula; `shown`: rows whose next frame may be seen."""
        assert self.denoiser is not None, "check_decoding has seen to it"
        return frame.tokens + self.token_noise * self.denoiser(frame, following, shown)

    def check_decoding(self, config: DecodingConfig, name: str) -> None:
        """Raises a ValueError if this model, of the world `name`, has not what is asked for."""
        check_decoding(self.flow, config)
        if config.denoise != "none" and self.denoiser is None:
            raise ValueError(
                f"denoise: expected 'none' for {name}, a world without a denoiser, got {config.denoise!r}. "
                "Train one along (`sfv-world train`)."
            )


def model_config(
    size: int,
    height: int = 64,
    width: int = 64,
    *,
    patch: int = 8,
    kind: DeepKind = "frame-parallel",
    bands: int | None = None,
    groups: int = 1,
    bins: int = 0,
    window: int = 6,
    noise: float = 0.05,
    denoiser: bool = True,
    autoencoder: AutoencoderConfig | None = None,
) -> ModelConfig:
    """A configuration from one dial: `size` layers deep, 48 channels wide a layer.

    The shallow blocks are half as wide: as many as there are `bands` of equal steps of spatial frequency (default: 6), the
    coarsest in `groups`, or two in raster order if there are no bands (the default of the autoregressive kind). With `bins` the
    coarsest band is cut in three, a patch's brightness, its colour and the rest, and drawn with curves of so many bins. The
    denoiser is as wide, of two layers. Size 4 has about 4 million parameters, size 8 about 21 million. With an `autoencoder` the
    world is one of its latents: `patch` counts places of them, `noise` is theirs, and bands go from the largest principal
    components of a token to the smallest.
    """
    codec: PixelCodecConfig | LatentCodecConfig
    if autoencoder:
        codec, unit = LatentCodecConfig(autoencoder, patch), 1
    else:
        codec, unit = PixelCodecConfig(height, width, patch), 3
    steps = codec.channels // unit
    bands = (min(6, steps) if kind == "frame-parallel" else 0) if bands is None else bands
    deep = TransformerConfig(width=48 * size, depth=size, head_dim=48, window=window)
    shallow = TransformerConfig(width=48 * max(1, size // 2), depth=2 if kind == "frame-parallel" else 1, head_dim=48)
    ends = [unit * max(band, round(steps * (band / bands) ** 2)) for band in range(bands + 1)] if bands else [0]
    sizes, curves = tuple(end - start for start, end in pairwise(ends)), tuple[int, ...]()
    if bins and sizes:
        first = tuple(part for part in (1, min(2, sizes[0] - 1), sizes[0] - 3) if part > 0)
        sizes, curves = (*first, *sizes[1:]), (bins,) * len(first)
    flow = FlowConfig(codec.channels, codec.grid, deep, shallow, bands=sizes, groups=groups, bins=curves, kind=kind)
    if kind == "autoregressive":
        flow = replace(flow, draft_width=shallow.width)
    return ModelConfig(codec, flow, noise, denoiser=replace(shallow, depth=2) if denoiser else None)
