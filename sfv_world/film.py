"""Films and contact sheets: what a world imagines, beside what really happened."""

import math
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8

from sfv_world.checkpoint import replacing
from sfv_world.data.clips import Clips, ClipSampler, Episodes, take
from sfv_world.model import WorldModel
from sfv_world.state import WorldOutput
from sfv_world.world import World


class Continuation(NamedTuple):
    """Held-out clips and a world's own continuation of their beginnings under the same actions."""

    clips: Clips
    imagined: UInt8[np.ndarray, "b n h w 3"]
    """The frames after the context."""
    outputs: list[WorldOutput]
    """What the world said of each step of them."""


def long_clips(episodes: Episodes, rows: int, frames: int, seed: int = 0) -> Clips:
    """Clips of `frames` frames that lie wholly within episodes, starting at random places."""
    return ClipSampler(episodes, frames, rows).clips(long_starts(episodes, rows, frames, seed))


def long_starts(episodes: Episodes, rows: int, frames: int, seed: int = 0) -> Int64[np.ndarray, " rows"]:
    """Where the clips of `long_clips` start."""
    fitting = np.concatenate([np.arange(s, e - frames) for s, e in zip(episodes.starts, episodes.ends, strict=True)])
    if len(fitting) == 0:
        raise ValueError(
            f"frames: expected fewer, context included, than the longest episode has ({episodes.lengths.max()}), got {frames}. Ask "
            "for fewer, or record longer episodes."
        )
    return np.random.default_rng(seed).choice(fitting, size=rows)


def imagine(world: World, clips: Clips, context: int, seed: int = 0) -> Continuation:
    """Resets to the first `context` frames of clips and imagines the others, whole steps of them, under their actions.

    A world on a released model imagines one clip after the other: its rows are what takes memory.
    """
    rows, frames = clips.valid.shape
    parts = [np.arange(rows)] if isinstance(world.model, WorldModel) else np.split(np.arange(rows), rows)
    found: list[list[WorldOutput]] = []
    for part in parts:
        found.append([])
        past = take(clips.actions, np.s_[part, : context - 1])
        state = world.reset(clips.frames[part, :context], past, seeds=seed * 100_003 + part)
        for frame in range(context, frames, world.time):
            actions = take(clips.actions, np.s_[part, frame - 1 : frame - 1 + world.time])
            state, output = world.step(state, actions, held=False)
            found[-1].append(output)
    outputs = [WorldOutput(*map(torch.cat, zip(*step, strict=True))) for step in zip(*found, strict=True)]
    imagined = [output.frames.reshape(rows, -1, *world.frame_shape).cpu().numpy() for output in outputs]
    return Continuation(clips, np.concatenate(imagined, axis=1), outputs)


def as_shown(world: World, frames: UInt8[np.ndarray, "n h w 3"], seed: int) -> UInt8[np.ndarray, "n h w 3"]:
    """Real frames as the world shows those that it imagines: through its codec, with its noise."""
    rng, codec, parts = np.random.default_rng([seed, 2]), world.model.codec, []
    for first in range(0, len(frames), 256):
        part = torch.from_numpy(frames[first : first + 256])
        uniform, normal = (
            torch.from_numpy(draw((len(part), *shape), np.float32))
            for draw, shape in ((rng.random, part.shape[1:]), (rng.standard_normal, codec.config.signal))
        )
        tokens = world.model.noised_tokens(*(x.to(world.device) for x in (part, uniform, normal)))
        parts.append(codec.frames(codec.decode(tokens)).cpu().numpy())
    return np.concatenate(parts)


def compare(world: World, episodes: Episodes, path: Path, rows: int = 4, frames: int = 24, context: int = 4) -> None:
    """Writes a film (and a contact sheet beside it) of imagined clips above their real continuations.

    It is shorter where no episode is long enough, and none where there is none that goes on for a step after the context.
    """
    frames = min(frames, int(episodes.lengths.max()) - context - 1) // world.time * world.time
    if frames < 1:
        return
    clips = long_clips(episodes, rows, context + frames)
    found = imagine(world, clips, context)
    pairs = np.stack([found.imagined, clips.frames[:, context:]], axis=1)
    write_video(path, rearrange(pairs, "b two n h w c -> n (two h) (b w) c"), episodes.fps or world.fps)
    sheet = rearrange(pairs[:, :, :: max(1, frames // 12)], "b two n h w c -> (b two h) (n w) c")
    write_image(path.with_suffix(".png"), sheet)


def decibels(mean_square: float) -> float:
    """Peak signal-to-noise ratio of frames of 256 levels with such a mean squared error."""
    return 10 * math.log10(255**2 / max(mean_square, 1e-9))


def write_image(path: Path, image: UInt8[np.ndarray, "h w 3"]) -> None:
    """Writes an RGB image as PNG, whole or not at all."""
    encoded, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert encoded, "PNG encodes every uint8 image"
    with replacing(path) as beside:
        beside.write_bytes(data.tobytes())


LARGEST = 16382
"""Side of the largest film that the encoders make, in pixels: an even number that WebP can hold."""


def check_film(height: int, width: int) -> None:
    """Raises a ValueError if a film of such frames cannot be written; films are enlarged at least twice, to even sides."""
    if 2 * max(height, width) > LARGEST:
        raise ValueError(
            f"film: expected frames of at most {LARGEST // 2} pixels a side, got {height} x {width}. Show fewer rows or episodes."
        )


def write_video(path: Path, frames: UInt8[np.ndarray, "n h w 3"], fps: float, scale: int = 4) -> None:
    """Writes an H.264 film, enlarged `scale` times without smoothing (less where it would be too large), whole or not at all.

    Raises:
        ValueError: if the frames are too large for a film.
    """
    frames = _enlarged(frames, scale)
    with replacing(path) as beside, av.open(str(beside), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000), options={"crf": "18"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_animation(path: Path, frames: UInt8[np.ndarray, "n h w 3"], fps: float, scale: int = 4) -> None:
    """Writes an animated WebP, which web pages play again and again, enlarged as films are, whole or not at all.

    Raises:
        ValueError: if the frames are too large for a film.
    """
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in _enlarged(frames, scale)]
    animation.durations = [round(1000 / fps)] * len(frames)
    encoded, data = cv2.imencodeanimation(".webp", animation, [cv2.IMWRITE_WEBP_QUALITY, 60])
    assert encoded, "WebP encodes all frames that a film can have"
    with replacing(path) as beside:
        beside.write_bytes(data.tobytes())


def _enlarged(frames: UInt8[np.ndarray, "n h w 3"], scale: int) -> UInt8[np.ndarray, "n sh sw 3"]:
    """Frames `scale` times as large, less where a film of them would be too large; sides are even.

    Raises:
        ValueError: if the frames are too large for a film.
    """
    check_film(*frames.shape[1:3])
    scale = min(scale, LARGEST // max(frames.shape[1:3]) // 2 * 2)
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)
