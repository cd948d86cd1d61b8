"""The world in verbs: reset, step, observe, score; a batch of rows on one device, each with its own randomness (`chance`)."""

import copy
import math
import zlib
from collections.abc import Callable
from dataclasses import fields as fields_of
from dataclasses import replace
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import gymnasium as gym
import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from sfv_world import chance
from sfv_world.checkpoint import STARTS, load_tensors, save_tensors
from sfv_world.control.spaces import action_size, flatten_actions
from sfv_world.decoding.frames import FrameReport, StreamState
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.denoiser import Seen
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.shallow import BandFlow
from sfv_world.given import given_frames, given_noise, given_seeds
from sfv_world.graphs import Recorder
from sfv_world.layers import attention_without_plans
from sfv_world.memory import check_rows
from sfv_world.model import WorldModel
from sfv_world.released.adapted import AdaptedModel
from sfv_world.state import Held, WorldOutput, WorldState
from sfv_world.transfer import to_device

Function = TypeVar("Function", bound=Callable[..., Any])


def untracked(function: Function) -> Function:
    """A verb without gradients, without autocast, which would round what is exact, and without attention planned for each shape.

    Never in inference mode: a state that was made in it could not go on outside.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    @wraps(function)
    def alone(self: "World", *args: Any, **options: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False), attention_without_plans():
            return function(self, *args, **options)

    return cast(Function, alone)


class Score(NamedTuple):
    """Exact likelihoods of whole videos, by row and frame."""

    log_likelihood: Float[Tensor, "b t"]
    bits_per_dim: Float[Tensor, "b t"]
    rewards: Float[Tensor, "b t 2"]
    termination_probability: Float[Tensor, "b t"]


class Abduction(NamedTuple):
    """What real trajectories are made of, to a world: where they begin and the exact noise of every frame after that."""

    state: WorldState
    """After the context frames; step from a copy (`state[:]`)."""
    noise: Float[Tensor, "b t l c"]
    """Exact noise of every step after the context."""
    frames: UInt8[Tensor, "b n h w 3"]
    """Their frames as the world sees them: what `step` shows when it decodes their noise, noised or cleaned causally; with
    look-ahead, noised."""
    log_likelihood: Float[Tensor, "b t"]
    """Theirs, as in `WorldOutput`."""


class World:
    """A learned world: a model, how to decode it and frames to start from."""

    def __init__(
        self,
        model: WorldModel | AdaptedModel,
        decoding: DecodingConfig | None = None,
        starts: dict[str, Tensor] | None = None,
        about: dict[str, Any] | None = None,
        folder: Path | None = None,
    ):
        self.model = model.eval()
        self.decoding = decoding or model.decoding
        self.starts, self.about, self.folder = starts, about or {}, folder
        self._recorder: Recorder | None = None

    def __repr__(self) -> str:
        return f"World({self.name!r}, actions {self.action_space}, frames {self.observation_shape}, on {self.device})"

    def with_decoding(self, **fields: Any) -> "World":
        """This world, decoding otherwise; the weights are shared.

        Args:
            fields: of `DecodingConfig` (tolerance, block, max_sweeps, draft, temperature, guidance, denoise).

        Raises:
            TypeError: if there is no such field.
            ValueError: if its value is out of range, or the model has not what is asked for.
        """
        names = [field.name for field in fields_of(DecodingConfig)]
        if unknown := [name for name in fields if name not in names]:
            raise TypeError(f"unexpected keyword argument {unknown[0]!r}: expected some of {', '.join(names)}.")
        own = copy.copy(self)
        own.decoding = replace(self.decoding, **fields)
        own.check_decoding()
        return own

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name if self.folder else "world"

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of one row's action."""
        return self.model.action_space

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """Height, width and 3."""
        return self.model.config.codec.height, self.model.config.codec.width, 3

    @property
    def fps(self) -> float:
        """Frames a second, of the recording that it learned from; 10 if nothing says."""
        return float(self.about.get("data", {}).get("fps") or 10)

    @property
    def time(self) -> int:
        """Frames of a step: 1, or in a world whose codec compresses time, as many as it takes for one latent frame."""
        return self.model.codec.time

    @property
    def observation_shape(self) -> tuple[int, ...]:
        """That of a frame, or, where a step has several, of all of them: (time, height, width, 3)."""
        return self.frame_shape if self.time == 1 else (self.time, *self.frame_shape)

    @property
    def device(self) -> torch.device:
        """Where the world is computed."""
        return self.model.codec.scale.device

    @cached_property
    def checksum(self) -> int:
        """Of the configuration and the weights: a state belongs to the world whose checksum it was saved with."""
        checksum = zlib.crc32(repr(self.model.identity).encode())
        for tensor in self.model.state_dict().values():
            checksum = zlib.crc32(tensor.cpu().contiguous().view(torch.uint8).numpy(), checksum)
        return checksum

    def compiled(self) -> "World":
        """This world and all that share its weights, shallow flow and denoiser compiled (`torch.compile`); the same to rounding.

        On two CPU cores a fifth faster at batch 32; at batch 1 where the shallow flow takes many passes. The first step of every
        batch size compiles, which takes up to a minute.

        Raises:
            ValueError: if the shallow flow does not go in bands: sweeps over fewer and fewer tokens do not pay for compiling.
        """
        shallow, denoiser = getattr(self.model.flow, "shallow", None), self.model.denoiser
        if not isinstance(shallow, BandFlow):
            raise ValueError(
                f"compiled: expected a world whose shallow flow goes in bands, got {self.name}, whose does not."
            )
        if "decode" not in vars(shallow):  # else they are compiled already
            for module in (*shallow.blocks, *([] if denoiser is None else [denoiser])):
                module.rope.move_to(self.device)  # what moves by itself when it is called would be compiled twice
            shallow.decode = torch.compile(shallow.decode, dynamic=False)  # type: ignore[method-assign]
            if denoiser is not None:
                denoiser.compile(dynamic=False)
        return self

    @property
    def direct(self) -> bool:
        """Whether a frame takes a fixed number of passes; else it takes sweeps, as many as it needs to converge."""
        if not isinstance(self.model, WorldModel):
            return False
        flow = self.model.flow
        return isinstance(flow.shallow, BandFlow) and flow.config.kind == "frame-parallel"

    def recorded(self) -> "World":
        """This world, its steps recorded as CUDA graphs: each is one launch instead of some hundred; the same to rounding.

        The first step of every batch size at each place of the ring records, which takes some tenths of a second. Memory grows by
        one state for every batch size, and by what a step computes with for every recording.

        Raises:
            ValueError: if the world is on no CUDA device, or a frame takes sweeps, as many as it needs.
        """
        if not self.direct:
            raise ValueError(
                "recorded: expected a frame-parallel world whose shallow flow goes in bands, got "
                f"{self.name}, whose frames take sweeps."
            )
        if self.device.type != "cuda":
            raise ValueError(f"recorded: expected a world on a CUDA device, got one on {self.device}. Load it there.")
        self._recorder = Recorder()
        return self

    def save_state(self, state: WorldState, path: str | Path) -> None:
        """Writes a state to a safetensors file, from which it goes on bit for bit.

        Raises:
            ValueError: if the state is another world's, or was used up.
        """
        self._check_own(state)
        metadata = {"world": str(self.checksum), "clock": str(state.clock)}
        save_tensors(Path(path), state[:].tensors(), metadata)  # a copy shares nothing within itself, as files must not

    def load_state(self, path: str | Path) -> WorldState:
        """Reads what `save_state` wrote.

        Raises:
            ValueError: if it is no state, or one of another world.
        """
        tensors, metadata = load_tensors(Path(path), self.device)
        if metadata.get("world") != str(self.checksum):
            raise ValueError(
                f"{path}: expected a state of the world {self.name} (checksum {self.checksum}), got {metadata or 'none'}. "
                "Load it into the world it was saved from, computing in the same dtype."
            )
        return WorldState.of(self.checksum, tensors, self.model.stream_of(tensors, int(metadata["clock"])))

    @untracked
    def reset(
        self, frames: Any, actions: Any = None, seeds: Any = None, clock: int | None = None, *, noised: bool = False
    ) -> WorldState:
        """Reads K observed frames of every row.

        Args:
            frames: (B, K, H, W, 3) uint8, array or tensor; K is 1 + a multiple of `time`.
            actions: the B x K-1 actions between them; unknown if not given.
            seeds: an integer per row; 0, 1, 2, ... if not given.
            clock: that of a state which the rows shall join (see `WorldState.put`).
            noised: whether the frames are imagined ones, which carry the world's noise already: none is added to them. Those of a
                latent world carry none, its decoder takes it out: they are read as any others.

        Raises:
            ValueError: if shapes, types or values are not what the world expects, or there is no room for so many rows.
        """
        frames = given_frames(frames, "(B, K", self.frame_shape, self.device)
        if noised and not self.model.codec.shows_noise:
            raise ValueError(
                f"noised: expected False, as {self.name} is a world of latents, whose decoder takes the noise out of the frames "
                "it shows; got True. Leave it out: the frames are encoded and noised as observed ones are."
            )
        rows, count = frames.shape[:2]
        vectors, known = self._past_actions(actions, rows, count)
        return self._reset(frames, vectors, known, given_seeds(seeds, rows), clock, noised)

    @untracked
    def start(self, seeds: Any, clock: int | None = None) -> WorldState:
        """Begins a row for every seed at one of the start frames that came with the world, chosen by the seed."""
        if self.starts is None:
            raise ValueError(f"{self.name}: expected start frames in {STARTS}, found none. Pass frames to reset.")
        seeds = given_seeds(seeds, len(np.atleast_1d(seeds)))
        count = len(self.starts["frames"])
        chosen = torch.tensor([int(np.random.default_rng([int(seed), 1]).integers(count)) for seed in seeds])
        frames = to_device(self.starts["frames"][chosen], self.device)
        vectors = to_device(self.model.codec.by_step(self.starts["actions"][chosen]).flatten(2), self.device)
        known = torch.arange(vectors.shape[1], device=self.device) > 0
        return self._reset(frames, vectors, known.expand(len(seeds), -1), seeds, clock)

    @untracked
    def step(
        self, state: WorldState, actions: Any, noise: Any = None, *, held: bool = True
    ) -> tuple[WorldState, WorldOutput]:
        """Imagines the next frame of every row, or the frames of the next step where it has several.

        With `decoding.denoise` "lookahead", all that is returned tells of the frame before it; the first step tells of the last
        observed frame, and after a frame that ended the episode one more step is needed to be told of it.

        Args:
            state: where the rows stand; used up.
            actions: an action per row; None if the model shall know of none.
            noise: (B, L, C) float32 to decode as it is, whatever the temperature; the rows' own draw if not given.
            held: whether each action is held for all frames of the step; else they are B x `time`, one for each frame.

        Raises:
            ValueError: if the state was used up, the actions are not of the space or the noise is not of the world.
        """
        self.check_state(state)
        vectors, known = self._actions(state, actions, held)
        if noise is None:
            drawn = chance.noise(state.seeds, state.ages, self._token_shape)
            z = self.decoding.temperature * to_device(drawn, self.device)
        else:
            z = given_noise(noise, (len(state), *self._token_shape), self.device)
        draws = self._draws(state.seeds, state.ages)
        state.spent, before = True, state.stream.tokens
        imagine = self._imagine if self._recorder is None else self._imagine_recorded
        return self._next(state, imagine(state.stream, z, draws, vectors, known), before)

    @untracked
    def observe(
        self, state: WorldState, actions: Any, frames: Any, *, held: bool = True
    ) -> tuple[WorldState, WorldOutput]:
        """Reads the next frame of every row, which is given, (B, H, W, 3) uint8; otherwise as `step`.

        With look-ahead, what is returned tells of the frame before, here too. Where a step has several frames, they are
        (B, time, H, W, 3).

        Raises:
            ValueError: as `step`, or if frames are not as the world expects, or its codec looks back in time and frames of a row
                were imagined.
        """
        self.check_state(state)
        controls = self.model.controls(*self._actions(state, actions, held))
        frames = given_frames(frames, "(B", self.observation_shape, self.device)
        if len(frames) != len(state):
            raise ValueError(f"frames: expected {len(state)} rows as the state has, got {len(frames)}.")
        video = frames[:, None] if self.time == 1 else frames
        noise, before = self._noise(state.seeds, state.ages, 1), state.stream.tokens
        self.model.check_reading(state.stream)
        state.spent = True
        report = self.model.read_frame(state.stream, video, *noise, controls)
        output = self._output(self._draws(state.seeds, state.ages), report, frames)
        return self._next(state, Held(output, report.features, torch.zeros_like(output.terminated)), before)

    @untracked
    def abduct(self, frames: Any, actions: Any = None, seeds: Any = None, context: int = 1) -> Abduction:
        """Finds the noise that real trajectories are made of: what would have happened, had one acted otherwise?

        Stepping from its `state` with its `noise` and the same actions decodes the same frames, noised as the seeds say, up to
        the solver's tolerance; with other actions, it decodes what the same chance would have made of them (abduction, action,
        prediction: Pearl, Causality, 2nd ed., section 7.1).

        Args:
            frames: (B, T, H, W, 3) uint8; T is 1 + a multiple of `time`.
            actions: the B x T-1 actions between them; unknown if not given.
            seeds: an integer per row, they decide the noise added to the frames; 0, 1, 2, ... if not given.
            context: number of frames that are read first, K >= 1, 1 + a multiple of `time`; the noise is that of the steps of
                the other T - K.

        Raises:
            ValueError: if shapes, types or values are not what the world expects, or nothing is left after the context.
        """
        frames = given_frames(frames, "(B, K", self.frame_shape, self.device)
        rows, count = frames.shape[:2]
        if not 1 <= context < count:
            raise ValueError(
                f"context: expected 1 to {count - 1} of the {count} frames, got {context}. Give more frames, or read fewer first."
            )
        vectors, known = self._past_actions(actions, rows, count)
        row_seeds, begun = given_seeds(seeds, rows), self.model.codec.steps(context)
        start = self._reset(frames[:, :context], vectors[:, :begun], known[:, :begun], row_seeds)
        clean = self.decoding.denoise == "causal"
        stream, reports, shown = start[:].stream, [], []
        for n, step in enumerate(frames[:, context:].split(self.time, dim=1)):
            controls = self.model.controls(vectors[:, begun + n], known[:, begun + n])
            noise = self._noise(row_seeds, start.ages + n, 1)
            reports.append(self.model.read_frame(stream, step, *noise, controls, as_imagined=True))
            shown.append(self.model.show(stream, reports[-1].features, clean).reshape(step.shape))
        found = torch.stack([report.noise for report in reports], dim=1)
        log_prob = torch.stack([report.log_prob for report in reports], dim=1)
        return Abduction(start, found, torch.cat(shown, dim=1), log_prob.sum(-1) + self.model.codec.log_det)

    @untracked
    def at_clock(self, state: WorldState, clock: int) -> WorldState:
        """A copy of a state that can join rows at another clock: bit for bit if it is its own, else to float32 rounding."""
        own = state[:]
        if clock != state.clock and isinstance(self.model, WorldModel):  # rows on a released model have no common one
            own.stream.cache = self.model.flow.deep.at_clock(own.stream.cache, clock)
        return own

    @untracked
    def score(self, frames: Any, actions: Any = None, seeds: Any = None) -> Score:
        """Scores whole videos in one parallel pass: what `reset` and `observe` would say, frame by frame.

        It takes memory for every frame, about 1.3 MB in `doom-basic`; `observe` does not.

        Args:
            frames: (B, T, H, W, 3) uint8; T is 1 + a multiple of `time`.
            actions: the B x T-1 actions between them; unknown if not given.
            seeds: an integer per row; they decide the noise.

        Returns:
            What is said of every step: of the first frame, then of every `time` frames.

        Raises:
            ValueError: if shapes, types or values are not what the world expects, or there is no room for so many frames.
        """
        frames = given_frames(frames, "(B, K", self.frame_shape, self.device)
        rows, count = frames.shape[:2]
        check_rows(rows, self.model.row_size(count, self.decoding), self.device)
        vectors, known = self._past_actions(actions, rows, count)
        tokens = self._noised(frames, given_seeds(seeds, rows), np.zeros(rows, np.int64))
        reading = self.model(tokens, vectors, known)
        return Score(
            reading.log_likelihood,
            self._bits(reading.log_likelihood),
            self.model.heads.rewards(reading.outcome),
            reading.outcome.termination_probability,
        )

    def _reset(
        self,
        frames: Tensor,
        vectors: Tensor,
        known: Tensor,
        seeds: np.ndarray,
        clock: int | None = None,
        noised: bool = False,
    ) -> WorldState:
        self.check_decoding()
        rows, steps = vectors.shape[:2]
        check_rows(rows, self.model.row_size(frames.shape[1], self.decoding), self.device)
        noise = self._noise(seeds, np.zeros(rows, np.int64), steps, 0.0 if noised else 1.0)
        ahead = self.decoding.denoise == "lookahead"
        controls = self.model.controls(vectors, known)
        stream, report = self.model.read_video(frames, *noise, controls, clock, report=ahead)
        last = frames[:, -1] if self.time == 1 else frames[:, (np.arange(-self.time, 0) + len(frames[0])).clip(0)]
        state = WorldState(self.checksum, stream, last, seeds, np.full(rows, steps))
        if ahead:
            # The first step tells of the last observed frame, which earned nothing.
            assert report is not None, "it was asked for"
            output = self._output(self._draws(seeds, state.ages - 1), report, frames[:, -1])
            goes_on = torch.zeros_like(output.terminated)
            output = output._replace(terminated=goes_on, rewards=torch.zeros_like(output.rewards))
            state.held = Held(output, report.features, goes_on)
        return state

    def _imagine(self, stream: Any, z: Tensor, draws: Tensor, vectors: Tensor, known: Tensor) -> Held:
        """The next frame, made of its noise `z` and `draws`; advances `stream`, and asks the device for nothing."""
        controls, guided = self.model.controls(vectors, known), self.decoding.guidance > 0
        unguided = self.model.controls(vectors, torch.zeros_like(known)) if guided else None
        report = self.model.imagine_frame(stream, z, controls, self.decoding, unguided)
        frames = self.model.show(stream, report.features, self.decoding.denoise == "causal")
        output = self._output(draws, report, frames, guided)
        return Held(output, report.features, torch.ones_like(output.terminated))

    def _imagine_recorded(self, stream: StreamState, *given: Tensor) -> Held:
        """The same from a recording: one for each place in the ring, at which the clock is data."""
        assert self._recorder is not None, "whoever calls this has seen to it"
        cache, place = stream.cache, stream.cache.clock % stream.cache.window

        def imagine(keys: Tensor, values: Tensor, visible: Tensor, tokens: Tensor, time: Tensor, *given: Tensor) -> Any:
            own = StreamState(FrameCache(keys, values, visible, place, time), tokens, [])
            current = own.cache.current  # before the cache advances
            output, features, imagined = self._imagine(own, *given)
            return *current, own.tokens, features, imagined, *output

        inputs = (cache.keys, cache.values, cache.visible, stream.tokens, cache.time, *given)
        keys, values, stream.tokens, features, imagined, *output = self._recorder(
            imagine, inputs, (self.decoding, place)
        )
        for old, new in zip(cache.current, (keys, values), strict=True):
            old.copy_(new)
        cache.advance()
        return Held(WorldOutput(*output), features, imagined)

    def _output(self, draws: Tensor, report: FrameReport, frames: Tensor, guided: bool = False) -> WorldOutput:
        """What is to be said of frames."""
        log_likelihood = report.log_prob.sum(-1) + self.model.codec.log_det
        outcome = self.model.outcome(report.features)
        probability = outcome.termination_probability
        terminated = draws < probability
        return WorldOutput(
            frames=frames,
            log_likelihood=log_likelihood,
            bits_per_dim=self._bits(log_likelihood),
            rewards=self.model.heads.rewards(outcome),
            termination_probability=probability,
            terminated=terminated,
            sweeps=report.sweeps,
            shallow_sweeps=report.shallow_sweeps,
            certificate=report.certificate,
            guided=torch.full_like(terminated, guided),
            noise=report.noise,
            frames_behind=torch.zeros_like(report.sweeps),
        )

    def _next(self, state: WorldState, newest: Held, before: Tensor) -> tuple[WorldState, WorldOutput]:
        """The state after a frame, and what is said at that step; `before` are the tokens of the frame before it."""
        output, held = newest.output, None
        if state.held is not None:
            assert isinstance(self.model, WorldModel), "check_decoding has seen to it"
            output, held = state.held.output, newest
            following = Seen(state.stream.tokens, newest.features)
            clean = self._shown(self.model.cleaned(Seen(before, state.held.features), following, ~output.terminated))
            frames = torch.where(state.held.imagined[:, None, None, None], clean, output.frames)
            output = output._replace(frames=frames, frames_behind=torch.ones_like(output.frames_behind))
        return WorldState(self.checksum, state.stream, output.frames, state.seeds, state.ages + 1, held), output

    def _shown(self, tokens: Tensor) -> Tensor:
        return self.model.codec.frames(self.model.codec.decode(tokens))

    def check_state(self, state: WorldState) -> None:
        """Raises a ValueError unless the world can go on from `state` as it decodes now."""
        self.check_decoding()
        self._check_own(state)
        if not len(state):
            raise ValueError("state: expected at least one row, got none.")
        ahead = self.decoding.denoise == "lookahead"
        if ahead != (state.held is not None):
            raise ValueError(
                f"state: expected one of a world with{'' if ahead else 'out'} look-ahead, got one with{'out' if ahead else ''}. "
                "Reset with the same denoise option."
            )

    def _check_own(self, state: WorldState) -> None:
        """Raises a ValueError unless `state` is one of this world that was not used up."""
        if not isinstance(state, WorldState):
            raise ValueError(
                f"state: expected a WorldState, got {type(state).__name__}. What environments save has one: `row` or `rows`."
            )
        if (state.world, state.frames.device) != (self.checksum, self.device):
            raise ValueError(
                f"state: expected one of {self.name} on {self.device} (checksum {self.checksum}), got one of another world, on "
                f"{state.frames.device} (checksum {state.world}). Use it with the world that made it."
            )
        state.check()

    def check_decoding(self) -> None:
        """Raises a ValueError if the model has not what is asked for."""
        self.model.check_decoding(self.decoding, self.name)

    def _bits(self, log_likelihood: Tensor) -> Tensor:
        return -log_likelihood / (math.log(2) * self.model.config.dimensions)

    def _noised(self, frames: Tensor, seeds: np.ndarray, ages: np.ndarray) -> Tensor:
        """Tokens of observed frames (b, t, h, w, 3), the first of each row having the number `ages`."""
        steps = self.model.codec.steps(frames.shape[1])
        return self.model.noised_tokens(frames, *self._noise(seeds, ages, steps))

    def _noise(self, seeds: np.ndarray, ages: np.ndarray, steps: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """(uniform, `scale` times normal) for so many observed frames, or steps, of rows."""
        signal = self.model.config.codec.signal
        uniform, normal = chance.noise_of_observed(seeds, ages, steps, self.frame_shape, signal)
        return to_device(uniform, self.device), to_device(scale * normal, self.device)

    def _draws(self, seeds: np.ndarray, ages: np.ndarray) -> Tensor:
        return to_device(chance.draws(seeds, ages), self.device)

    def _actions(self, state: WorldState, actions: Any, held: bool = True) -> tuple[Tensor, Tensor]:
        """Vectors of the rows' actions, and whether they are known."""
        state.check()
        rows = len(state)
        if actions is None:
            vectors = np.zeros((rows, self.time * action_size(self.action_space)), np.float32)
        elif held:
            vectors = np.tile(flatten_actions(self.action_space, actions, (rows,)), self.time)
        else:
            vectors = flatten_actions(self.action_space, actions, (rows, self.time)).reshape(rows, -1)
        known = torch.full((rows,), actions is not None, device=self.device)
        return to_device(vectors, self.device), known

    def _past_actions(self, actions: Any, rows: int, frames: int) -> tuple[Tensor, Tensor]:
        """Vectors (rows, steps, n) of what led to each frame (or to the frames of each step), and whether that is known."""
        known = np.zeros((rows, self.model.codec.steps(frames)), bool)
        vectors = np.zeros((rows, frames, action_size(self.action_space)), np.float32)
        if actions is not None:
            vectors[:, 1:] = flatten_actions(self.action_space, actions, (rows, frames - 1))
            known[:, 1:] = True
        by_step = self.model.codec.by_step(torch.from_numpy(vectors)).flatten(2)
        return to_device(by_step, self.device), to_device(known, self.device)

    @property
    def _token_shape(self) -> tuple[int, int]:
        codec = self.model.config.codec
        return math.prod(codec.grid), codec.channels
