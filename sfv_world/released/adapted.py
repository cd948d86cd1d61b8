"""A world on a released model: a control encoder, a control adapter and outcome heads, on a backbone that stays as it is.

STARFlow-V's control (arXiv 2511.20462): the backbone is frozen, and a module of its own tells the deep block of actions. Its part
of the world is all that is trained and saved; the backbone is read from where it lies. A step is one latent frame: `time` frames,
with as many actions, which one step of an environment holds.

What the likelihood is conditional on: the frames of its chunk before it, their actions and the prompt. The model sees at most
`chunk` latent frames; then it restarts with the last `context` of them, as it was trained to. Chunks are counted from a
video's first frame, so a parallel pass over a video and a stream are the same function.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from sfv_world.checkpoint import CONFIG, MODEL, fitting, kind_of, read_world
from sfv_world.codec.video import VideoCodec, VideoCodecConfig
from sfv_world.control.encoder import ControlEncoder
from sfv_world.control.spaces import action_size
from sfv_world.decoding.frames import FrameReport
from sfv_world.decoding.solver import DecodingConfig, SolverConfig
from sfv_world.flow.affine import Fields
from sfv_world.flow.model import Encoding
from sfv_world.heads import Outcome, OutcomeHeads
from sfv_world.model import Reading
from sfv_world.released.adapter import ControlAdapter
from sfv_world.released.backbone import Backbone, fingerprint
from sfv_world.released.cache import cache_size
from sfv_world.released.memory import codec_needs
from sfv_world.released.model import ReleasedFlow
from sfv_world.released.sampling import SEQUENTIAL, DeepStream, Drawn, Report, ShallowInverse, clean, join
from sfv_world.released.stream import Past, ReleasedStream, Videos


@dataclass(frozen=True)
class AdaptedConfig:
    """Everything that decides which weights a world on a released model has, and how it reads videos."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    backbone: str
    """Folder of the released model, with its VAE: relative to the world's, or absolute."""
    fingerprint: int
    """Checksum of the released model and VAE that the adapter was trained on."""
    codec: VideoCodecConfig
    """Frames to tokens."""
    noise: float
    """Standard deviation of the noise added to latents. The density is over the noised latents."""
    prompt: str = ""
    """What the model is told to show; its states are kept with the weights."""
    control_width: int = 128
    """Channels of a control token."""
    control_tokens: int = 4
    """Control tokens a step."""
    chunk: int = 21
    """Latent frames that the model sees at once, as in training."""
    context: int = 5
    """Latent frames of a chunk that the next one begins with."""

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ValueError(
                f"noise: expected more than 0, for frames without noise have no density, got {self.noise}."
            )
        if not 1 <= self.context < self.chunk:
            raise ValueError(
                f"context: expected at least 1 latent frame and fewer than the chunk's {self.chunk}, got {self.context}."
            )

    @property
    def dimensions(self) -> int:
        """Dimensions of the density of a step: the latents of a latent frame."""
        return math.prod(self.codec.signal)

    def chunks(self, frames: int) -> Iterator[tuple[slice, int]]:
        """The chunks of a video of so many latent frames, and how many frames of each the one before it had already."""
        done = 0
        while done < frames:
            first = max(0, done - self.context) if done else 0
            stop = min(frames, first + self.chunk)
            yield slice(first, stop), done - first
            done = stop


class AdaptedModel(nn.Module):
    """What `WorldModel` is to worlds of their own weights; the backbone is no submodule, so no weight of it is trained or saved.

    Args:
        config: shapes.
        action_space: of the action at each frame.
        backbone: the released model.
    """

    text: Tensor
    """States of the prompt."""
    unconditional: Tensor
    """States of the prompt without its caption, to guide away from."""
    decoding = DecodingConfig(block=64, denoise="causal")
    """How such a world is decoded if nothing else is said: its noise is too large to look at."""
    denoiser = None
    """A denoiser of its own there is none: the backbone's cleans frames, or its score where it has none."""

    def __init__(self, config: AdaptedConfig, action_space: gym.Space[Any], backbone: Backbone):
        super().__init__()
        self.config, self.action_space, self.backbone = config, action_space, backbone
        shape, size = backbone.flow.config, action_size(action_space)
        self.controls = ControlEncoder(config.codec.time * size, config.control_width, config.control_tokens)
        self.adapter = ControlAdapter(shape.deep_width, shape.layers_per_block[-1], config.control_width)
        self.heads = OutcomeHeads(shape.deep_width, queries=0)
        for name in ("text", "unconditional"):
            self.register_buffer(name, torch.zeros(1, shape.txt_size, shape.txt_dim))

    @property
    def identity(self) -> tuple[AdaptedConfig, str]:
        """What decides, with the weights, which world it is: wherever the backbone lies, and in what it computes."""
        return replace(self.config, backbone=""), str(self.flow.block(-1).layer_weight.dtype)

    @property
    def flow(self) -> ReleasedFlow:
        """The backbone's."""
        return self.backbone.flow

    @property
    def codec(self) -> VideoCodec:
        """The backbone's."""
        return self.backbone.codec

    @property
    def midstream(self) -> range:
        """As `WorldModel.midstream`, of the latent frames of a chunk: those after the ones it begins with."""
        return range(self.config.context, self.config.chunk)

    @property
    def memory(self) -> str:
        """What of the past it reads, in words."""
        return f"chunks of {self.config.chunk} latent frames that begin with the last {self.config.context} of the one before"

    def row_size(self, frames: int, decoding: DecodingConfig) -> float:
        """About the bytes that it takes to begin a row: keys and values of a chunk, twice where it is guided, and the encoder's."""
        shape, codec, copies = self.flow.config, self.config.codec, 2 if decoding.guidance else 1
        itemsize = self.flow.block(-1).layer_weight.itemsize
        encoder = codec_needs(self.codec.vae, codec.height, codec.width, 4)[-1]
        return copies * cache_size(shape.layers_per_block[-1], shape.deep_width, self._slots, itemsize) + encoder.size

    @property
    def _slots(self) -> int:
        """Slots of the deep block: those of the text and of a whole chunk."""
        return self.text.shape[1] + self.config.chunk * math.prod(self.config.codec.grid)

    @property
    def token_noise(self) -> Float[Tensor, "c"]:
        """Standard deviation of the noise in every channel of a token."""
        return self.config.noise / self.codec.scale

    def noised_tokens(
        self,
        frames: UInt8[Tensor, "b n height width 3"],
        uniform: Float[Tensor, "b _ height width 3"],
        normal: Float[Tensor, "b t h w k"],
    ) -> Float[Tensor, "b t l c"]:
        """Tokens of videos from their first frame on, latents noised by `normal` ~ N(0, 1); `uniform` has no part in them."""
        return self.codec.encode(self.codec.signal(frames) + self.config.noise * normal)

    def forward(
        self,
        tokens: Float[Tensor, "b t l c"],
        actions: Float[Tensor, "b t n"],
        known: Bool[Tensor, "b t"],
        heads_apart: bool = False,
    ) -> Reading:
        """Reads videos in one parallel pass a chunk; as `WorldModel.forward`, with the actions of all frames of a step."""
        controls, parts = self.controls(actions, known), []
        for at, before in self.config.chunks(tokens.shape[1]):
            told = self.adapter.told(controls[:, at], self.text.shape[1])
            found = self.flow(tokens[:, at], _rows(self.text, len(tokens)), self.codec.config.grid, told)
            *parted, fields = (found.noise, found.log_det, found.latents, found.features, found.fields)
            parts.append([x[:, before:] for x in (*parted, *fields)])
        noise, log_det, latents, features, mu, sigma = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
        encoding = Encoding(noise, log_det, latents, features, Fields(mu, sigma))
        log_likelihood = encoding.log_prob.sum(-1) + self.codec.log_det
        return Reading(encoding, log_likelihood, self.outcome(features.detach() if heads_apart else features), None)

    def outcome(self, features: Float[Tensor, "*b l w"]) -> Outcome:
        """As `WorldModel.outcome`: of a frame's slots, the one that the deep block reads first has seen nothing of it."""
        return self.heads(self.flow.orient(-1, features)[..., :1, :])

    def read_video(
        self,
        frames: UInt8[Tensor, "b n height width 3"],
        uniform: Float[Tensor, "b t height width 3"],
        normal: Float[Tensor, "b t h w k"],
        controls: Float[Tensor, "b t m d"],
        clock: int | None = None,
        *,
        report: bool = False,
    ) -> tuple[ReleasedStream, None]:
        """Reads videos that begin here; rows have no clock in common, whatever `clock`, and nothing is reported."""
        videos = Videos(np.arange(len(frames)))
        self._read(videos, frames, normal, controls)
        return ReleasedStream([videos]), None

    def check_reading(self, stream: ReleasedStream) -> None:
        """Raises a ValueError if frames of a row were imagined, which the encoder, that looks back in time, has not seen."""
        if rows := sorted(row for videos in stream.parts if not videos.observed for row in videos.rows.tolist()):
            raise ValueError(
                f"state: expected rows all of whose frames were observed, since the codec looks back in time; got imagined ones in "
                f"rows {rows}. Reset to the frames."
            )

    def read_frame(
        self,
        stream: ReleasedStream,
        frames: UInt8[Tensor, "b time height width 3"],
        uniform: Float[Tensor, "b 1 height width 3"],
        normal: Float[Tensor, "b 1 h w k"],
        controls: Float[Tensor, "b m d"],
        *,
        as_imagined: bool = False,
    ) -> FrameReport:
        """Reads the frames of the next step.

        What is shown later follows them as they are or, `as_imagined`, as `show` then shows them, noised.
        """
        self._regroup(stream)
        given, reports = (frames, normal, controls[:, None]), []
        for videos in stream.parts:
            video, noise, told = (stream.of_part(videos, x) for x in given)
            reports.append(self._read(videos, video, noise, told, as_imagined))
        return _joined(stream, reports)

    def imagine_frame(
        self,
        stream: ReleasedStream,
        noise: Float[Tensor, "b l c"],
        controls: Float[Tensor, "b m d"],
        decoding: DecodingConfig,
        unguided: Float[Tensor, "b m d"] | None = None,
    ) -> FrameReport:
        """Decodes the latent frame of the next step from its noise.

        Guidance moves it away from what the model says with neither the prompt nor any of the chunk's actions; `unguided` has no
        part in it.
        """
        self._regroup(stream)
        reports = []
        for videos in stream.parts:
            z, told = (stream.of_part(videos, x) for x in (noise, controls))
            reports.append(self._imagine(videos, z, told, decoding))
        return _joined(stream, reports)

    def stream_of(self, tensors: Mapping[str, Tensor], clock: int) -> ReleasedStream:
        """The stream whose `tensors` are among these; rows have no clock in common, whatever `clock`."""
        return ReleasedStream.of(tensors, lambda rows: self.flow.block(-1).new_cache(rows, self._slots))

    def show(
        self, stream: ReleasedStream, features: Float[Tensor, "b l w"], clean: bool
    ) -> UInt8[Tensor, "b *time height width 3"]:
        """The frames of the step that was decoded last, with their noise or cleaned by the chunk so far; to be asked for once."""
        frames = stream.joined([self._show(videos, clean) for videos in stream.parts])
        return frames if self.codec.time > 1 else frames[:, 0]

    def check_decoding(self, config: DecodingConfig, name: str) -> None:
        """Raises a ValueError if what is asked for is not to be had on a released model."""
        if config.denoise == "lookahead" or config.draft == "learned":
            raise ValueError(
                f"denoise, draft: expected 'none' or 'causal' and no 'learned' for {name}, a world on a released model, got "
                f"{config.denoise!r} and {config.draft!r}."
            )

    @torch.no_grad()
    def _read(
        self,
        videos: Videos,
        frames: UInt8[Tensor, "b n height width 3"],
        normal: Float[Tensor, "b t h w k"],
        controls: Float[Tensor, "b t m d"],
        as_imagined: bool = False,
    ) -> FrameReport:
        """Reads frames of videos that are together; the report is of the last step."""
        signal = self.codec.signal(frames, memory=videos.seen)
        if not as_imagined:
            self.codec.frames(signal, videos.shown)  # what is imagined later is shown as following these
        for tokens, told in zip(
            self.codec.encode(signal + self.config.noise * normal).unbind(1), controls.unbind(1), strict=True
        ):
            latents, stages = self.flow.within_frames(tokens, self.codec.config.grid)
            drawn = self._deep(videos, told).read(latents[:, None])
            videos.chunk.append(Past(tokens, latents, told))
            videos.shallow = dict(enumerate(stages))
        once = torch.full_like(drawn.report.sweeps, len(stages))
        shallow = Report(self.flow.log_det(stages, tokens), once, torch.zeros_like(drawn.report.certificate))
        return _frame_report(drawn, shallow)

    @torch.no_grad()
    def _imagine(
        self, videos: Videos, noise: Float[Tensor, "b l c"], controls: Float[Tensor, "b m d"], decoding: DecodingConfig
    ) -> FrameReport:
        drawn = self._deep(videos, controls, decoding, decoding.guidance).draw(noise)
        if decoding.guidance:  # every pass with prompt and actions goes with one without
            drawn = drawn._replace(report=drawn.report._replace(sweeps=2 * drawn.report.sweeps))
        inverse = ShallowInverse(self.flow, self.codec.config.grid, decoding, videos.shallow)
        tokens, shallow = inverse(drawn.latents)
        videos.chunk.append(Past(tokens, drawn.latents, controls))
        videos.shallow, videos.observed = inverse.previous, False
        return _frame_report(drawn, shallow)

    def _regroup(self, stream: ReleasedStream) -> None:
        """Has videos go on together that came to the same place, where their chunks restart."""
        if len(stream.parts) > 1 and any(len(videos.chunk) == self.config.chunk for videos in stream.parts):
            stream.regroup()

    def _show(self, videos: Videos, clean_first: bool) -> UInt8[Tensor, "b time height width 3"]:
        tokens = videos.chunk[-1].tokens[:, None]
        if clean_first:
            chunk, _, controls = (torch.stack(part, dim=1).split(1) for part in zip(*videos.chunk, strict=True))
            cleaned = []
            for tokens, told in zip(chunk, controls, strict=True):  # one by one: a parallel pass is what takes memory
                adapted = self.adapter.told(told, self.text.shape[1])
                whole = clean(self.flow, tokens, self.text, self.codec.config.grid, self.config.noise, adapted)
                cleaned.append(whole[:, -1:])
            tokens = torch.cat(cleaned)
        return self.codec.frames(self.codec.decode(tokens), videos.shown)

    def _deep(
        self,
        videos: Videos,
        controls: Float[Tensor, "b m d"],
        decoding: SolverConfig = SEQUENTIAL,
        guidance: float = 0.0,
    ) -> DeepStream:
        """The deep block at the next frame of videos, told of its controls.

        It reads their chunk again where that is full and restarts, or where guidance is new to it.
        """
        if len(videos.chunk) == self.config.chunk:
            videos.chunk = videos.chunk[-self.config.context :]
            videos.deep = None  # its keys and values go before there are new ones
        if guidance and videos.deep is not None and videos.deep.block.copies == 1:
            videos.deep = None
        if videos.deep is None:
            for past in videos.chunk:
                self._deep_at(videos, past.controls, SEQUENTIAL, guidance).read(past.latents[:, None])
        return self._deep_at(videos, controls, decoding, guidance)

    def _deep_at(
        self, videos: Videos, controls: Float[Tensor, "b m d"], decoding: SolverConfig, guidance: float
    ) -> DeepStream:
        """The deep block where videos stand; guided, or once it was, it reads everything a second time, as told of nothing."""
        told, texts = controls[:, None], [_rows(text, len(controls)) for text in (self.text, self.unconditional)]
        stream = DeepStream(
            self.flow, texts[0], self.codec.config.grid, self.config.chunk,
            unconditional=texts[1], guidance=guidance, decoding=decoding, state=videos.deep,
        )  # fmt: skip
        if stream.block.copies > 1:
            told = torch.cat([told, self.controls.absent.expand_as(told)])
        stream.block.told = self.adapter.told(told)
        videos.deep = stream.state
        return stream


def _rows(states: Float[Tensor, "1 k e"], rows: int) -> Float[Tensor, "b k e"]:
    """The same states of text for every row."""
    return states.expand(rows, -1, -1)


def _joined(stream: ReleasedStream, reports: list[FrameReport]) -> FrameReport:
    """The report of all rows from those of the stream's parts."""
    return FrameReport(*(stream.joined(parts) for parts in zip(*reports, strict=True)))


def _frame_report(drawn: Drawn, shallow: Report) -> FrameReport:
    both = join(drawn.report, shallow)
    return FrameReport(
        both.log_prob, drawn.noise, drawn.features, drawn.report.sweeps, shallow.sweeps, both.certificate
    )


def is_adapted(folder: Path) -> bool:
    """Whether the world in a folder is one on a released model."""
    return kind_of(folder) == AdaptedConfig.__name__


def load_adapted(
    folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> tuple[AdaptedModel, dict[str, Any]]:
    """Reads a world on a released model, and what its configuration says about it; `dtype` as in `Backbone.load`.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if the folder holds no such world, or its backbone is not there, is another, or does not fit into memory.
    """
    config, action_space, about = read_world(folder, AdaptedConfig)
    backbone, size = (folder / config.backbone).resolve(), (config.codec.height, config.codec.width)
    if not backbone.is_dir():
        raise ValueError(
            f"backbone: expected the released model that {folder} was trained on in {backbone}, found no such folder. "
            f"Put it there, or name its place in {CONFIG}."
        )
    outline = Backbone.outline(backbone, *size)
    if outline.codec.config != config.codec or fingerprint(backbone) != config.fingerprint:
        raise ValueError(
            f"backbone: expected the released model and VAE that {folder} was trained on (checksum {config.fingerprint}), "
            f"got others in {backbone}. Name their place in {CONFIG}."
        )
    tensors = fitting(folder / MODEL, lambda: AdaptedModel(config, action_space, outline), device)
    model = AdaptedModel(config, action_space, Backbone.load(backbone, *size, device, config.chunk, dtype)).to(device)
    model.load_state_dict(tensors)
    return model.eval(), about
