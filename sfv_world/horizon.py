"""Long horizons: imagines far beyond the training window and measures how the frames drift away from real ones.

Writes `horizon.json`, the plot `horizon.png` and the contact sheet `frames.png`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, UInt8
from tqdm import tqdm

from sfv_world.checkpoint import replacing
from sfv_world.data.clips import Episodes, take
from sfv_world.drift import (
    STATISTICS,
    colour_and_contrast,
    judged_imagined,
    squared_error,
    ssim,
    train_judge,
    typicality,
)
from sfv_world.evaluation import split_as_trained
from sfv_world.film import as_shown, decibels, long_clips, write_image
from sfv_world.free_run import Beginnings, HorizonConfig, Rollout, beginnings, choose_episodes, free_run, shown_frames
from sfv_world.horizon_report import LEVEL, panels, table
from sfv_world.loading import load_world
from sfv_world.memory import Need, check_memory
from sfv_world.model import WorldModel
from sfv_world.plot import draw
from sfv_world.world import World

FIRST_BIN = 8
"""Steps of the first bin of the horizon; each bin ends at twice the step."""
RANGE = (0.005, 0.995)
"""Quantiles of real frames between which a frame's colours and contrast are within the range of real ones."""
EXAMPLES = 1500
"""Frames of either kind that a judge is trained on, at most, and tested on."""


def horizon(config: HorizonConfig) -> dict[str, Any]:
    """Imagines, prints and writes what was found, and returns it."""
    world = load_world(config.world, config.device).with_decoding(temperature=config.temperature)
    whole = world.model.codec.whole
    config = replace(config, context=whole(config.context), frames=whole(config.frames + 1) - 1)
    if config.restart and not isinstance(world.model, WorldModel):
        raise ValueError(
            f"restart: expected none for {world.name}, a world on a released model, whose chunks restart by themselves, got "
            f"{config.restart}. Leave it out."
        )
    if config.project and world.model.denoiser is None:
        raise ValueError(
            f"project: expected a world with a denoiser, got {world.name}, which has none. Train one along."
        )
    size = float(np.prod(world.frame_shape)) * config.rows * config.frames
    remedy = "Imagine fewer frames or rows."
    check_memory([Need("imagined frames", size)], torch.device("cpu"), remedy)
    held_out = split_as_trained(world, config.data)[1]
    episodes = choose_episodes(held_out, config)
    begin = beginnings(held_out, episodes, config)
    rollout = free_run(world, begin, config)
    results = measure(world, held_out, episodes, begin, rollout, config)
    config.out.mkdir(parents=True, exist_ok=True)
    with replacing(config.out / "horizon.json") as beside:
        beside.write_text(json.dumps(results, indent=2) + "\n")
    write_image(config.out / "horizon.png", draw(panels(results)))
    steps = _sheet_steps(config.frames)
    shown = np.concatenate([begin.frames[:, -1:], rollout.frames[:, steps - 1]], axis=1)
    write_image(config.out / "frames.png", rearrange(shown, "b n h w c -> (b h) (n w) c"))
    print(table(results))
    print(
        f"wrote {config.out}: horizon.json, horizon.png, and frames.png (last real frame; steps {', '.join(map(str, steps))})"
    )
    return results


def measure(
    world: World,
    held_out: Episodes,
    episodes: Int[np.ndarray, "b"],
    begin: Beginnings,
    rollout: Rollout,
    config: HorizonConfig,
) -> dict[str, Any]:
    """Compares imagined frames with the real ones that would have come, and with real frames at large.

    Real frames are shown like the imagined ones, noised or cleaned, before colours, contrast and the judge see them; PSNR and
    SSIM are to the real ones.
    """
    real, owner, number = real_frames(world, held_out, config)
    steps = number - config.context + 1

    # A row counts up to its first termination, that frame included, or all along.
    ended_before = np.cumsum(rollout.terminated, axis=1) - rollout.terminated > 0
    counts = ~ended_before if config.stop else np.ones_like(rollout.terminated)
    known = (np.arange(config.frames) < begin.real_lengths[:, None]) & counts
    real_statistics = colour_and_contrast(real)
    statistics = np.stack([colour_and_contrast(frames) for frames in _by_step(rollout.frames)], axis=1)
    low, high = np.quantile(real_statistics, RANGE, axis=0)
    inside = ((statistics >= low) & (statistics <= high)).all(axis=-1)

    centre_from, compared_with = held_out_bits(world, held_out, config)
    p_values = typicality(rollout.bits, centre_from, compared_with)
    similar = _similarity(rollout.frames, begin, known)
    judged, real_right = _judge(real, owner, episodes, rollout.frames, counts, config)

    bits = np.concatenate([centre_from, compared_with])
    bins = []
    for first, last in pairwise(bin_edges(config.frames)):
        here = np.zeros_like(counts)
        here[:, first:last] = counts[:, first:last]
        if not here.any():
            continue
        real_here = (steps > first) & (steps <= last)
        entry: dict[str, Any] = {
            "steps": [first + 1, last],
            "frames": int(here.sum()),
            **dict(zip(STATISTICS, statistics[here].mean(axis=0).tolist(), strict=True)),
            "in_range_of_real": float(inside[here].mean()),
            "bits_per_dim": float(rollout.bits[here].mean()),
            "typical": float((p_values[here] >= LEVEL).mean()),
            "terminated": int((rollout.terminated & here).sum()),
            "judge_accuracy": _halfway(_mean(judged[here]), real_right),
            "real": {"frames": int(real_here.sum())},
        }
        if real_here.any():
            entry["real"] |= dict(zip(STATISTICS, real_statistics[real_here].mean(axis=0).tolist(), strict=True))
        for name, errors in (("psnr", similar["error"]), ("psnr_of_copying", similar["error_of_copying"])):
            entry[name] = _psnr(errors[here & known])
        for name in ("ssim", "ssim_of_copying"):
            entry[name] = _mean(similar[name][here & known])
        bins.append(entry)

    def by_step(values: np.ndarray) -> list[float | None]:
        return [_mean(column[used]) for column, used in zip(values.T, counts.T, strict=True)]

    first_end = np.where(rollout.terminated.any(axis=1), rollout.terminated.argmax(axis=1) + 1, 0)
    return {
        "config": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "memory": world.model.memory,
        "bins": bins,
        "real": {
            **dict(zip(STATISTICS, real_statistics.mean(axis=0).tolist(), strict=True)),
            "in_range_of_real": float(((real_statistics >= low) & (real_statistics <= high)).all(axis=-1).mean()),
            "range": {name: [float(a), float(b)] for name, a, b in zip(STATISTICS, low, high, strict=True)},
            "bits_per_dim": float(bits.mean()),
            "bits_per_dim_range": np.quantile(bits, [LEVEL / 2, 1 - LEVEL / 2]).tolist(),
            "frames": len(real),
            "judged_real": real_right,
        },
        "first_termination": [int(step) or None for step in first_end],
        "largest_certificate": rollout.certificate,
        "by_step": {
            **{name: by_step(statistics[..., i]) for i, name in enumerate(STATISTICS)},
            "in_range_of_real": by_step(inside),
            "bits_per_dim": by_step(rollout.bits),
            "p_value": by_step(p_values),
            "psnr": [_psnr(column[used]) for column, used in zip(similar["error"].T, known.T, strict=True)],
            "ssim": [_mean(column[used]) for column, used in zip(similar["ssim"].T, known.T, strict=True)],
        },
    }


def real_frames(
    world: World, held_out: Episodes, config: HorizonConfig
) -> tuple[UInt8[np.ndarray, "n h w 3"], Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Held-out frames as the world shows those that it imagines, the episode of each, and its number there.

    Worlds whose codec looks back in time read whole episodes for that, and show all but the first frame, up to whole steps.
    """
    lengths, first = shown_frames(held_out), 0
    if isinstance(world.model, WorldModel):
        index = [np.arange(start, start + length) for start, length in zip(held_out.starts, lengths, strict=True)]
        shown = as_shown(world, held_out.frames[np.concatenate(index)], config.seed)
    else:
        lengths, first = 1 + (lengths - 1) // world.time * world.time, 1
        seeds = np.random.default_rng([config.seed, 2]).integers(2**63 - 1, size=len(held_out))
        parts = []
        for episode in tqdm(np.flatnonzero(lengths > 1), desc="real frames", unit="episode"):
            start, length = held_out.starts[episode], lengths[episode]
            actions = take(held_out.actions, np.s_[start : start + length - 1])
            frames, seed = held_out.frames[start : start + length], seeds[episode : episode + 1]
            parts.append(world.abduct(frames[None], take(actions, np.s_[None]), seed).frames[0].cpu().numpy())
        shown = np.concatenate(parts)
    owner = np.repeat(np.arange(len(held_out)), lengths - first)
    return shown, owner, np.concatenate([np.arange(first, length) for length in lengths])


def held_out_bits(
    world: World, held_out: Episodes, config: HorizonConfig
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "m"]]:
    """Bits per dimension of held-out frames that have as much before them as imagined ones, in two parts that share no clip."""
    wanted, time = world.model.midstream, world.time
    longest, least = int(shown_frames(held_out).max()), 2 + wanted.start * time
    if longest < least:
        raise ValueError(
            f"data: expected a held-out episode of at least {least} frames, got {longest}. Record longer ones."
        )
    steps = min(wanted.stop, 1 + (longest - 2) // time)
    count = max(2, -(-config.references // (steps - wanted.start)))
    clips = long_clips(held_out, count, 1 + (steps - 1) * time, config.seed)
    parts = np.array_split(np.arange(count), max(2, count // 16) if time == 1 else count)
    bits = [
        world.score(clips.frames[part], take(clips.actions, part), part).bits_per_dim[:, wanted.start :].cpu().numpy()
        for part in tqdm(parts, desc="held-out frames", unit="batch")
    ]
    found = np.concatenate(bits)
    return found[: count // 2].ravel(), found[count // 2 :].ravel()


def bin_edges(frames: int) -> list[int]:
    """0, 8, 16, 32, ... and `frames`; what is left after the last doubling joins the last bin if it is short of half of it."""
    edges = [0]
    while (step := max(FIRST_BIN, 2 * edges[-1])) < frames:
        edges.append(step)
    if len(edges) > 2 and frames - edges[-1] < edges[-1] // 4:
        edges.pop()
    return [*edges, frames]


def _by_step(frames: UInt8[np.ndarray, "b n h w 3"]) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
    return (frames[:, n] for n in range(frames.shape[1]))


def _similarity(
    frames: UInt8[np.ndarray, "b n h w 3"], begin: Beginnings, known: Bool[np.ndarray, "b n"]
) -> dict[str, Float[np.ndarray, "b n"]]:
    """Squared error and SSIM to the real continuation where there is one, of imagined frames and of the last observed one."""
    names = ("error", "ssim", "error_of_copying", "ssim_of_copying")
    found = {name: np.full(known.shape, np.nan) for name in names}
    for n in np.flatnonzero(known.any(axis=0)):
        rows = known[:, n]
        real = begin.real[rows, n]
        for suffix, guess in (("", frames[rows, n]), ("_of_copying", begin.frames[rows, -1])):
            found["error" + suffix][rows, n] = squared_error(guess, real)
            found["ssim" + suffix][rows, n] = ssim(guess, real)
    return found


def _judge(
    real: UInt8[np.ndarray, "r h w 3"],
    owner: Int[np.ndarray, "r"],
    episodes: Int[np.ndarray, "b"],
    frames: UInt8[np.ndarray, "b n h w 3"],
    counts: Bool[np.ndarray, "b n"],
    config: HorizonConfig,
) -> tuple[Float[np.ndarray, "b n"], float]:
    """Trains a judge on even rows and tests it on odd ones.

    Returns:
        For the frames it was tested on whether it took them for imagined ones, NaN for all others; and the share of the
        real frames it was tested on that it took for real ones.
    """
    rng = np.random.default_rng([config.seed, 3])
    even = np.arange(len(frames)) % 2 == 0
    # Real frames of episodes that begin even rows or none are to learn from, of those that begin odd rows to be tested on.
    held = np.isin(owner, episodes[~even])
    edges = bin_edges(config.frames)
    each = -(-EXAMPLES // (len(edges) - 1))

    def pick(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = [np.argwhere(counts[rows, first:last]) + np.array([0, first]) for first, last in pairwise(edges)]
        some = np.concatenate([rng.permutation(place)[:each] for place in places])
        return np.flatnonzero(rows)[some[:, 0]], some[:, 1]

    judge = train_judge(rng.permutation(real[~held])[:EXAMPLES], frames[pick(even)], config.seed)
    judged = np.full(counts.shape, np.nan)
    tested = pick(~even)
    judged[tested] = judged_imagined(judge, frames[tested])
    return judged, float((~judged_imagined(judge, rng.permutation(real[held])[:EXAMPLES])).mean())


def _sheet_steps(frames: int, count: int = 16) -> Int[np.ndarray, "n"]:
    return np.unique(np.geomspace(1, frames, count).round().astype(np.int64))


def _mean(values: Any) -> float | None:
    found = [value for value in np.asarray(values, float).ravel().tolist() if not np.isnan(value)]
    return float(np.mean(found)) if found else None


def _halfway(a: float | None, b: float) -> float | None:
    return None if a is None else (a + b) / 2


def _psnr(errors: Float[np.ndarray, "n"]) -> float | None:
    """Of squared errors averaged before the logarithm."""
    return decibels(errors.mean()) if len(errors) else None
