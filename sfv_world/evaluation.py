"""Measures a world on held-out episodes, against baselines: density, rollouts, rewards and terminations.

Writes `results.json` and the contact sheet `rollouts.png` into the world's folder, and its model card `README.md`.
"""

import json
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from pydantic import TypeAdapter
from tqdm import tqdm

from sfv_world.card import model_card, tables
from sfv_world.checkpoint import replacing
from sfv_world.data.clips import Clips, ClipSampler, Episodes, load_episodes, take
from sfv_world.data.split import recording_of
from sfv_world.denoiser import video_score
from sfv_world.film import Continuation, as_shown, compare, decibels, imagine, long_clips, long_starts
from sfv_world.flow.affine import Fields, standard_normal_log_prob
from sfv_world.given import DEVICE, check_counts, check_folder, check_seed
from sfv_world.loading import load_world
from sfv_world.lossless import lossless
from sfv_world.model import WorldModel
from sfv_world.training.objective import Batch
from sfv_world.world import World

HORIZONS = (1, 4, 8, 16)
RESULTS, CARD = "results.json", "README.md"
LONGEST = 512
"""Steps of an episode that are read in one pass, at most: each takes about a megabyte."""
Statistic = Callable[[Float[np.ndarray, "m k"]], Float[np.ndarray, " m"]]
"""Of many times k means: a number of each."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    world: str
    """Name of a shipped world, or its folder."""
    data: Path
    """The recording it was trained on; its held-out episodes are found by the run's own split."""
    clips: int = 256
    """Held-out clips to roll out, all at once; of a world on a released model one after the other, which takes long."""
    rollouts: int = 3
    """Imagined rollouts of each clip, averaged for PSNR."""
    context: int = 8
    """Observed frames before a rollout; up to whole steps, where those have several frames."""
    frames: int = 10_000
    """Held-out frames (steps, where those have several) to score, at most, each once."""
    seed: int = 0
    """Seed of the choice of clips and of all noise."""
    out: Path | None = None
    """Folder for results, card and pictures; none: the world's own."""
    device: str = DEVICE
    """Where to compute."""

    def __post_init__(self) -> None:
        check_counts(self, "clips", "rollouts", "context", "frames")
        check_seed(self.seed)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures a world, prints and writes what was found, and returns it.

    Raises:
        ValueError: if the recording or what is asked of it does not fit the world, a card would replace what is none, or nothing
            can be written there.
    """
    world = load_world(config.world, config.device)
    folder = config.out or Path(world.folder or ".")
    check_folder("out", folder)
    if (folder / CARD).exists() and not (folder / RESULTS).exists():
        raise ValueError(
            f"out: expected a folder without a {CARD} that is no model card, found one in {folder}. Name another (--out)."
        )
    config = replace(config, context=world.model.codec.whole(config.context))
    train, held_out = split_as_trained(world, config.data)
    most = int(held_out.lengths.max()) - 1 - max(HORIZONS)
    if most < world.model.codec.whole(1):
        raise ValueError(
            f"data: expected a held-out episode of at least {max(HORIZONS) + 2} frames to roll out, got at most "
            f"{held_out.lengths.max()} in {config.data}. Record longer ones."
        )
    if config.context > most:
        raise ValueError(
            f"context: expected at most {most} frames, {max(HORIZONS)} less than the longest held-out episode has after its first, "
            f"got {config.context}."
        )
    results = {
        "measured": _unusual(config),
        "density": density(world, train, held_out, config.frames, config.seed),
        "outcomes": outcomes(world, train, held_out, config.seed),
        "rollouts": rollouts(world, held_out, config),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    if world.model.denoiser:
        results["denoising"] = denoising(world, held_out, config.clips, config.seed)
    if isinstance(world.model, WorldModel):
        results["lossless"] = lossless(world, train, held_out, config.clips, config.seed)
    print(tables(results))
    with replacing(folder / RESULTS) as beside:
        beside.write_text(json.dumps(results, indent=2) + "\n")
    compare(world, held_out, folder / "rollouts.mp4", rows=6, frames=32, context=config.context)
    with replacing(folder / CARD) as beside:
        beside.write_text(model_card(world, results))
    return results


def _unusual(config: EvaluateConfig) -> dict[str, Any]:
    """What was asked for, as JSON has it, but what is measured if nothing is."""
    whole, usual = (
        TypeAdapter(EvaluateConfig).dump_python(each, mode="json", exclude={"world", "out", "device"})
        for each in (config, EvaluateConfig(config.world, config.data))
    )
    return {name: value for name, value in whole.items() if name == "data" or value != usual[name]}


def split_as_trained(world: World, data: Path) -> tuple[Episodes, Episodes]:
    """The episodes of a recording that a world was trained on and those it was not, by the split of its own training run.

    Episodes that were recorded later are neither; of a world that does not say how many episodes there were, there are none such.

    Raises:
        ValueError: if the world says nothing of its training, or the recording does not fit it.
    """
    run = world.about.get("training", {})
    if not {"held_out", "seed"} <= run.keys():
        raise ValueError(
            f"world: expected one that says how its data was split ('training' in its config.json), got {world.name}, "
            "which does not. Train it with `sfv-world train`."
        )
    episodes = load_episodes(data)
    expected, found = (world.frame_shape, world.action_space), (episodes.frames.shape[1:], episodes.action_space)
    if expected != found:
        raise ValueError(
            f"data: expected frames {expected[0]} and actions {expected[1]} as the world {world.name} has, got {found[0]} "
            f"and {found[1]}. Give the recording it was trained on."
        )
    of_world, of_data = (recording_of(about) for about in (world.about.get("data", {}), episodes.metadata))
    if of_world is not None and of_data is not None and of_world != of_data:
        raise ValueError(
            f"data: expected the recording that {world.name} was trained on, {of_world!r}, got {of_data!r}."
        )
    return episodes.split(run["held_out"], run["seed"], run.get("episodes"))


def density(world: World, train: Episodes, held_out: Episodes, frames: int, seed: int) -> dict[str, Any]:
    """Bits per dimension of held-out next frames, each once: the world's, the fitted copy's, and the noise's own entropy.

    Frames are read in clips of up to 16 steps, which overlap in one: all but an episode's first frame have 1 to 15 before them.
    A dimension is a colour value or, in a latent world, a latent; bits of one kind of world say nothing beside those of the other.
    Where a step has several frames, frames are steps.
    """
    model, time = world.model, world.time
    length = min(16, 1 + (int(held_out.lengths.max()) - 2) // time)  # in steps
    span = (length - 1) * time
    starts = np.concatenate([np.arange(s, e - 1, span) for s, e in zip(held_out.starts, held_out.ends, strict=True)])
    starts = np.sort(np.random.default_rng(seed).permutation(starts)[: max(1, frames // (length - 1))])
    clips = ClipSampler(held_out, 1 + span, len(starts)).clips(starts)
    steps = Batch.from_clips(clips, model)
    counted = (steps.valid & ~steps.terminal)[:, 1:].cpu()

    parts = np.array_split(np.arange(len(starts)), math.ceil(len(starts) / _at_once(world)))
    bits = torch.cat(
        [world.score(clips.frames[part], take(clips.actions, part), part).bits_per_dim.cpu() for part in parts]
    )[:, 1:]
    later = counted & (torch.arange(length - 1) >= length // 2 - 1)
    totals = torch.stack([torch.where(counted, bits, 0.0).sum(1), counted.sum(1)], dim=1).numpy()
    noise = model.config.noise
    return {
        "bits_per_dim": bits[counted].mean().item(),
        "bits_per_dim_error": _error(totals, held_out.of_rows(starts), lambda means: means[:, 0] / means[:, 1]),
        "bits_per_dim_full_context": bits[later].mean().item(),
        "bits_per_dim_fitted_copy": _fitted_copy(world, train, clips, counted, seed),
        "bits_per_dim_of_the_noise": math.log2(noise * math.sqrt(2 * math.pi * math.e)),
        "bits_per_frame": bits[counted].mean().item() * model.config.dimensions,
        "noise": noise,
        "dimension": "colour value" if model.codec.shows_noise else "latent",
        "unit": "frame" if time == 1 else "step",
        "frames": int(counted.sum()),
    }


def _fitted_copy(world: World, train: Episodes, clips: Clips, counted: Bool[torch.Tensor, "b t"], seed: int) -> float:
    """Bits per dimension of the counted steps of clips under a Gaussian around the clean frame before.

    It has a mean and a scale for every channel of a token, fitted to as long clips of training with the same noise; the world, to
    which it is compared, sees only noised frames.
    """
    codec, generator = world.model.codec, torch.Generator().manual_seed(seed)

    def differences(frames: UInt8[np.ndarray, "b n h w 3"]) -> Float[torch.Tensor, "b t l c"]:
        """Tokens of every step but the first, noised, less the clean ones of the step before."""
        found = []
        for part in torch.from_numpy(frames).split(_at_once(world)):
            given, uniform = part.to(world.device), torch.rand(part.shape, generator=generator).to(world.device)
            signal = codec.signal(given, uniform)
            normal = torch.randn(signal.shape, generator=generator).to(world.device)
            tokens = codec.encode(signal + world.model.config.noise * normal)
            found.append((tokens[:, 1:] - codec.encode(codec.signal(given))[:, :-1]).cpu())
        return torch.cat(found)

    first = 0 if world.time == 1 else 1  # a video's first latent frame is of one frame only: those after it are alike
    rows = 4000 // counted.shape[1] if world.time == 1 else 1
    fit = differences(long_clips(train, rows, clips.frames.shape[1], seed).frames)[:, first:].flatten(0, -2)
    found = differences(clips.frames)[:, first:]
    fields = Fields(fit.mean(0).expand_as(found), fit.std(0).expand_as(found))
    z, log_det = fields.normalise(found)
    log_prob = (standard_normal_log_prob(z) + log_det).sum(-1) + codec.log_det.cpu()
    return -log_prob[counted[:, first:]].mean().item() / (world.model.config.dimensions * math.log(2))


def _at_once(world: World) -> int:
    """Clips of 16 steps that are read at once."""
    return 16 if world.time == 1 else 1


def outcomes(world: World, train: Episodes, held_out: Episodes, seed: int, limit: int = 200) -> dict[str, Any]:
    """Calibration on whole held-out episodes, read frame by frame: a reliability table of terminations, errors of rewards.

    Longer ones than `LONGEST` steps are read in parts, each after the last steps of the one before. The reward is told given
    whether the episode ended with it; so is the baseline's, the median of those of training.
    """
    probabilities, terminated, rewards, expected = [], [], [], []
    order = np.random.default_rng(seed).permutation(len(held_out))[:limit]
    for episode in tqdm(order, desc="outcomes"):
        last = (world.model.codec.whole(int(held_out.lengths[episode])) - 1) // world.time
        for first in range(1, last + 1, LONGEST):
            begin = max(0, first - 1 - 2 * world.model.midstream.start)
            length = 1 + (min(last, first - 1 + LONGEST) - begin) * world.time
            part = ClipSampler(held_out, length, 1).clips(held_out.starts[[episode]] + begin * world.time)
            score, told = world.score(part.frames, part.actions, [seed]), Batch.from_clips(part, world.model)
            new = np.s_[0, first - begin :]
            ended = told.terminations[new].cpu().numpy()
            probabilities.append(score.termination_probability[new].cpu().numpy())
            terminated.append(ended)
            rewards.append(told.rewards[new].cpu().numpy())
            expected.append(score.rewards[new].cpu().numpy()[np.arange(len(ended)), ended.astype(int)])
    p, y = np.concatenate(probabilities), np.concatenate(terminated)
    r, e = np.concatenate(rewards), np.concatenate(expected)
    known, ending = _by_step(world, train)
    medians = [np.median(known[ending == end]) if (ending == end).any() else 0.0 for end in (False, True)]
    edges = np.array([0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0001])
    table = []
    for low, high in pairwise(edges):
        inside = (p >= low) & (p < high)
        if inside.any():
            row = {"from": float(low), "to": min(1.0, float(high)), "frames": int(inside.sum())}
            table.append({**row, "predicted": float(p[inside].mean()), "observed": float(y[inside].mean())})
    error = sum(row["frames"] * abs(row["predicted"] - row["observed"]) for row in table) / len(p)
    base = y.mean()
    return {
        "termination_reliability": table,
        "termination_calibration_error": float(error),
        "termination_brier": float(((p - y) ** 2).mean()),
        "termination_brier_of_the_base_rate": float(base * (1 - base)),
        "reward_mean_absolute_error": float(np.abs(r - e).mean()),
        "reward_mean_absolute_error_of_the_median": float(np.abs(r - np.where(y, medians[1], medians[0])).mean()),
        "reward_bias": float((e - r).mean()),
        "frames": len(p),
    }


def _by_step(world: World, episodes: Episodes) -> tuple[Float[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """The reward of every step of all episodes, and whether it ended its episode."""
    rewards, ended = [], []
    for start, length in zip(episodes.starts, episodes.lengths, strict=True):
        inside, rest = np.s_[start + 1 : start + length], (1 - length) % world.time
        rewards.append(np.pad(episodes.rewards[inside], (0, rest)).reshape(-1, world.time).sum(1))
        ended.append(np.pad(episodes.terminations[inside], (0, rest)).reshape(-1, world.time).any(1))
    return np.concatenate(rewards), np.concatenate(ended)


def rollouts(world: World, held_out: Episodes, config: EvaluateConfig) -> dict[str, Any]:
    """PSNR of the mean of several imagined rollouts, of one rollout, of copying the last frame and of the codec, by horizon.

    Squared errors are averaged before the logarithm, because a copy of a frame in which nothing moves has none at all. What the
    mean gains over the copy is of the same frames, and surer than either.
    """
    frames = config.context + max(HORIZONS)
    starts = long_starts(held_out, config.clips, frames, config.seed)
    clips = ClipSampler(held_out, frames, len(starts)).clips(starts)
    runs: list[Continuation] = [
        imagine(world, clips, config.context, seed=config.seed + run)
        for run in tqdm(range(config.rollouts), desc="rollouts")
    ]
    real = clips.frames[:, config.context :]
    copy = np.broadcast_to(clips.frames[:, config.context - 1 : config.context], real.shape)
    noised = world.decoding.denoise == "none"
    if noised:
        through_codec = as_shown(world, real.reshape(-1, *world.frame_shape), config.seed).reshape(real.shape)
    else:
        through_codec = _through_codec(world, clips.frames)[:, config.context :]
    mean = np.mean([run.imagined for run in runs], axis=0)
    outputs = [output for run in runs for output in run.outputs]
    compared = [frame - 1 for frame in HORIZONS]
    ours, one, copied, coded = (
        np.square(frames[:, compared].astype(np.float64) - real[:, compared]).mean((2, 3, 4))
        for frames in (mean, runs[0].imagined, copy, through_codec)
    )
    episodes = held_out.of_rows(starts)
    return {
        "psnr_of_the_mean": _by_horizon(_psnr, episodes, ours),
        "psnr_of_one": _by_horizon(_psnr, episodes, one),
        "psnr_of_copying": _by_horizon(_psnr, episodes, copied),
        "psnr_of_the_codec": _by_horizon(_psnr, episodes, coded),
        "gain_over_copying": _by_horizon(lambda means: _psnr(means) - _psnr(means[:, 1:]), episodes, ours, copied),
        "noised": noised,
        "rollouts": config.rollouts,
        "clips": config.clips,
        "context": config.context,
        "deep_sweeps": float(np.mean([output.sweeps.float().mean().item() for output in outputs])),
        "shallow_sweeps": float(np.mean([output.shallow_sweeps.float().mean().item() for output in outputs])),
        "largest_certificate": max(output.certificate.max().item() for output in outputs),
    }


def _through_codec(world: World, videos: UInt8[np.ndarray, "b n h w 3"]) -> UInt8[np.ndarray, "b n h w 3"]:
    """Whole videos to their clean signals and back."""
    codec = world.model.codec
    shown = [codec.frames(codec.signal(video.to(world.device))).cpu() for video in torch.from_numpy(videos).split(1)]
    return torch.cat(shown).numpy()


def denoising(world: World, held_out: Episodes, count: int, seed: int, length: int = 16) -> dict[str, dict[str, float]]:
    """How close to the clean frame noised held-out frames come, and how much what is left of the noise flickers.

    By way of cleaning: none; the flow's own score by autograd, of the whole clip (Tweedie's formula); the denoiser, causal and
    with look-ahead. Of frames that have half a clip before them and one after. PSNR in decibels; flicker is the root mean
    square change of the error from a frame to the next, in levels of 255.
    """
    model, clips = world.model, long_clips(held_out, count, length, seed)
    assert model.denoiser is not None, "the caller asks where there is one"
    generator = torch.Generator().manual_seed(seed)
    batch = Batch.from_clips(clips, model)
    errors: dict[str, list[torch.Tensor]] = {"none": [], "raw_score": [], "causal": [], "lookahead": []}
    for part in np.array_split(np.arange(count), math.ceil(count / 4)):
        frames, known = batch.frames[part], batch.known[part]
        uniform = torch.rand(frames.shape, generator=generator)
        normal = torch.randn((*frames.shape[:2], *model.config.codec.signal), generator=generator)
        tokens = model.noised_tokens(frames, uniform.to(world.device), normal.to(world.device)).requires_grad_()
        reading = model(tokens, batch.actions[part], known)
        (gradient,) = torch.autograd.grad(reading.log_likelihood.sum(), tokens)
        with torch.no_grad():
            features = reading.encoding.features
            scores = {
                "none": torch.zeros_like(tokens),
                "raw_score": model.token_noise * gradient,
                "causal": video_score(model.denoiser, tokens, features, torch.zeros_like(known)),
                "lookahead": video_score(model.denoiser, tokens, features),
            }
            for name, score in scores.items():
                shown = model.codec.frames(model.codec.decode(tokens + model.token_noise * score)).float()
                errors[name].append((shown - frames)[:, length // 2 : -1])
    found = {}
    for name, parts in errors.items():
        error = torch.cat(parts)
        flicker = error.diff(dim=1).square().mean().sqrt().item()
        found[name] = {"psnr": decibels(error.square().mean().item()), "flicker": flicker}
    return found


def _psnr(means: Float[np.ndarray, "m k"]) -> Float[np.ndarray, " m"]:
    """Peak signal-to-noise ratio of the first of k mean squared errors, in decibels."""
    return np.array([decibels(mean) for mean in means[:, 0]])


def _by_horizon(
    statistic: Statistic, episodes: Int64[np.ndarray, " b"], *squares: Float[np.ndarray, "b horizons"]
) -> dict[str, dict[int, float | None]]:
    """A statistic of mean squared errors by horizon, in decibels, and its standard error."""
    found: dict[str, dict[int, float | None]] = {"decibels": {}, "error": {}}
    for horizon, values in zip(HORIZONS, np.moveaxis(np.stack(squares, axis=-1), 1, 0), strict=True):
        found["decibels"][horizon] = float(statistic(values.mean(0, keepdims=True))[0])
        found["error"][horizon] = _error(values, episodes, statistic)
    return found


def _error(values: Float[np.ndarray, "n k"], episodes: Int64[np.ndarray, " n"], statistic: Statistic) -> float | None:
    """Standard error of a statistic of means, by resampling episodes: what was seen in one is not independent.

    None of a single episode, which says nothing of others.
    """
    group = np.unique(episodes, return_inverse=True)[1]
    counts = np.bincount(group).astype(float)
    if len(counts) < 2:
        return None
    sums = np.stack([np.bincount(group, column) for column in values.T], axis=1)
    drawn = np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))
    return float(statistic(sums[drawn].sum(1) / counts[drawn].sum(1)[:, None]).std())
