"""Free-running rollouts: how an imagined episode begins, and how it goes on far beyond the training window.

Episodes begin as held-out ones do and go on under real actions: those of the episode itself, then of others.
"""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from tqdm import tqdm

from sfv_world.data.clips import Actions, Episodes, take
from sfv_world.given import DEVICE, check_seed
from sfv_world.world import World, WorldState

ATTEMPTS = 16
"""How often frames that an episode must live through are drawn anew."""
NOISING = 2**62
"""The bit by which the seed of what is added to a frame differs from that of what it was drawn from."""


@dataclass(frozen=True)
class HorizonConfig:
    """How long to imagine, and how."""

    world: str
    """Name of a shipped world, or its folder."""
    data: Path
    """The recording it was trained on; its held-out episodes are found by the run's own split."""
    out: Path = Path("out/horizon")
    """Folder for results, plot and contact sheet."""
    frames: int = 1000
    """Frames to imagine; up to whole steps, where those have several frames."""
    rows: int = 8
    """Episodes to imagine; a judge is trained on half of them and tested on the others."""
    context: int = 8
    """Real frames the world observes first; up to whole steps."""
    restart: int | None = None
    """Frames after which the world is reset to the last `context` frames it imagined, as the released models' chunks always are;
    none: its window slides on and nothing is ever reset."""
    temperature: float = 1.0
    """Standard deviation of the noise; 1 samples the model's distribution."""
    project: bool = False
    """Whether the world goes on from what its denoiser makes of each frame, noised afresh, and not from the frame itself."""
    survive: int | None = None
    """Frames that rows live through: where an episode ends within so many, these are drawn anew, up to 16 times. Beyond an end
    there is nothing, real or learned; so this imagines episodes that go on. None: ends are ignored."""
    stop: bool = False
    """Whether an episode counts up to its first termination only; else terminations are reported and nothing more."""
    references: int = 2000
    """Held-out frames whose bits per dimension say what is typical, at least."""
    seed: int = 0
    """Seed of everything random."""
    device: str = DEVICE
    """Where to compute."""

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("rows", 2), ("context", 1), ("references", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}.")
        check_seed(self.seed)
        if self.survive is not None and (self.survive < 1 or self.stop):
            raise ValueError(
                f"survive: expected none or at least 1, without stop, got {self.survive} and stop {self.stop}. Episodes that "
                "live on do not stop."
            )
        if self.restart is not None and self.restart < self.context:
            raise ValueError(
                f"restart: expected none or at least {self.context}, the context that is kept, got {self.restart}. "
                "Restart less often, or with a smaller context."
            )


class Beginnings(NamedTuple):
    """Where imagined episodes begin, what is done in them, and what really happened."""

    frames: UInt8[np.ndarray, "b k h w 3"]
    """The context."""
    actions: Actions
    """Actions (b, k-1+n, ...): those between the context frames and those that lead to each imagined one."""
    real: UInt8[np.ndarray, "b m h w 3"]
    """The real continuations, as far as the longest goes."""
    real_lengths: Int[np.ndarray, "b"]
    """Frames of each real continuation."""


class Rollout(NamedTuple):
    """What was imagined, by row and frame."""

    frames: UInt8[np.ndarray, "b n h w 3"]
    bits: Float[np.ndarray, "b n"]
    """Bits per dimension, of a step those of each of its frames."""
    terminated: Bool[np.ndarray, "b n"]
    certificate: float
    """The largest."""


def choose_episodes(held_out: Episodes, config: HorizonConfig) -> Int[np.ndarray, "b"]:
    """An episode for every row: even and odd rows share none, for a judge learns from the former and is tested on the latter."""
    fitting = np.flatnonzero(shown_frames(held_out) > config.context)
    if len(fitting) < 2:
        raise ValueError(
            f"context: expected at least 2 held-out episodes of more than {config.context} frames, got {len(fitting)}. "
            "Give a longer recording, or observe fewer frames first."
        )
    order = np.random.default_rng([config.seed, 0]).permutation(fitting)
    halves = order[0::2], order[1::2]
    return np.array([halves[row % 2][row // 2 % len(halves[row % 2])] for row in range(config.rows)])


def shown_frames(episodes: Episodes) -> Int[np.ndarray, "e"]:
    """Frames of each episode that the game showed: without the last screen again, which stands for the end."""
    return episodes.lengths - np.add.reduceat(episodes.repeated.astype(np.int64), episodes.starts)


def beginnings(held_out: Episodes, episodes: Int[np.ndarray, "b"], config: HorizonConfig) -> Beginnings:
    """The beginnings of the given held-out episodes, and real actions for as long as is imagined.

    An episode's own actions come first, then those of other held-out episodes, whole ones at random; so actions are held
    for as long as they are in the recording.
    """
    rng = np.random.default_rng([config.seed, 1])
    wanted = config.context - 1 + config.frames
    rows = []
    for episode in episodes:
        parts: list[np.ndarray] = []
        while sum(len(part) for part in parts) < wanted:
            last = held_out.ends[episode] - 1  # no action is taken at it
            parts.append(np.arange(held_out.starts[episode], last))
            episode = rng.integers(len(held_out))
        rows.append(np.concatenate(parts)[:wanted])
    starts = held_out.starts[episodes]
    lengths = np.minimum(shown_frames(held_out)[episodes] - config.context, config.frames)
    frames = held_out.frames[starts[:, None] + np.arange(config.context)]
    after = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
    real = held_out.frames[starts[:, None] + config.context + after]
    return Beginnings(frames, take(held_out.actions, np.stack(rows)), real, lengths)


def free_run(world: World, begin: Beginnings, config: HorizonConfig) -> Rollout:
    """Imagines on and on, under the context policy of the configuration."""
    (rows, context), time = begin.frames.shape[:2], world.time
    cleaned = copy.copy(world)
    cleaned.decoding = replace(world.decoding, denoise="causal")
    frames = np.empty((rows, config.frames, *begin.frames.shape[2:]), np.uint8)
    bits, terminated, certificate = (np.zeros((rows, config.frames), dtype) for dtype in (float, bool, float))

    def imagine(state: WorldState, rows: Int[np.ndarray, "b"], step: int) -> WorldState:
        """Imagines the frames of a step of the given rows, which are those of `state`."""
        n, end = step * time, (step + 1) * time
        action = take(begin.actions, np.s_[rows, context - 1 + n : context - 1 + end])
        if config.restart and n and n % config.restart == 0:
            before = take(begin.actions, np.s_[rows, n : n + context - 1])
            seeds = state.seeds + len(begin.frames)  # or all chunks were of the same noise
            noised = world.model.codec.shows_noise
            state = world.reset(frames[rows, n - context : n], before, seeds, noised=noised)
        if config.project:
            _, output = cleaned.step(state[:], action, held=False)
            seeds, state.seeds = state.seeds, state.seeds ^ NOISING  # or the frame's own noise would be added once more
            state, _ = world.observe(state, action, output.frames, held=False)
            state.seeds = seeds
            shown = world.model.codec.frames(world.model.codec.decode(state.stream.tokens))
            output = output._replace(frames=shown)
        else:
            state, output = world.step(state, action, held=False)
        frames[rows, n:end] = output.frames.reshape(len(rows), time, *world.frame_shape).cpu().numpy()
        bits[rows, n:end] = output.bits_per_dim.cpu().numpy()[:, None]
        terminated[rows, end - 1] = output.terminated.cpu().numpy()
        certificate[rows, end - 1] = output.certificate.cpu().numpy()
        return state

    everyone = np.arange(rows)
    seeds = config.seed * 1_000_000_007 + everyone
    state = mark = world.reset(begin.frames, take(begin.actions, np.s_[:, : context - 1]), seeds)
    steps, survive = config.frames // time, config.survive and -(-config.survive // time)
    for step in tqdm(range(steps), desc="imagining", unit="step"):
        if survive and step % survive == 0:
            mark = state[:]
        state = imagine(state, everyone, step)
        if survive and (step + 1 == steps or (step + 1) % survive == 0):
            stretch = range(step - step % survive, step + 1)
            for attempt in range(ATTEMPTS):
                ended = np.flatnonzero(terminated[:, stretch.start * time : stretch.stop * time].any(axis=1))
                if len(ended) == 0:
                    break
                again = mark[ended]
                again.seeds = np.random.default_rng([config.seed, 2, step, attempt]).integers(
                    2**63 - 1, size=len(ended)
                )
                for one in stretch:
                    again = imagine(again, ended, one)
                state.put(ended, again)
        if config.stop and terminated.any(axis=1).all():
            done = (step + 1) * time
            frames[:, done:] = frames[:, done - 1 : done]
            break
    return Rollout(frames, bits, terminated, float(certificate.max()))
