"""Sequential decoding against Jacobi from every draft: passes, milliseconds, and how far apart the answers are.

    python benchmarks/decoding.py --data data/doom-basic     # fresh worlds of 64, 256 and 1024 tokens a frame
    python benchmarks/decoding.py --worlds doom-basic        # worlds that are trained already

How many sweeps Jacobi takes depends on what a world has learned (one with random weights takes one or two), so fresh
worlds are trained on a recording first, briefly; every table says for how long. Grids differ in their patches: frames
of 64 x 64 in patches of 8, 4 and 2 pixels. Prints tables and writes JSON with the machine, the versions and the commit.
"""

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from gymnasium.vector.utils import batch_space
from learning import VARIANTS, Variant, trained
from report import Report, Rows, command, synchronise
from tqdm import tqdm

from sfv_world.agents.policies import HeldRandomPolicy
from sfv_world.data.clips import load_episodes
from sfv_world.decoding.solver import DecodingConfig, Draft
from sfv_world.given import DEVICE, set_threads
from sfv_world.loading import load_world
from sfv_world.training.config import TrainConfig
from sfv_world.world import World

SEQUENTIAL = "sequential"


@dataclass(frozen=True)
class DecodingBenchmarkConfig:
    """What to train and decode."""

    data: Path | None = None
    """Recording (see `sfv-world collect`) to train fresh worlds on; none: no fresh worlds."""
    worlds: tuple[str, ...] = ()
    """Names or folders of worlds to decode as they are."""
    grids: tuple[int, ...] = (8, 16, 32)
    """Tokens in a row and in a column of a fresh world's frame."""
    kinds: tuple[Variant, ...] = ("autoregressive", "frame-parallel-raster", "frame-parallel")
    """Which fresh worlds."""
    train_steps: int = 300
    """Training steps of each fresh world."""
    preset: Literal["tiny", "small", "base"] = "tiny"
    """Size of fresh worlds: about 1, 4 or 21 million parameters."""
    window: int = 3
    """Frames a fresh world's deep flow sees."""
    clip: int = 4
    """Frames of a training clip."""
    batch: int = 2
    """Clips of a training batch."""
    held_out: float = 0.05
    """Part of the episodes that is never trained on."""
    resume: bool = False
    """Go on with the fresh worlds in `folder` that were begun; those that are complete are only decoded."""
    frames: int = 8
    """Frames to decode in every way."""
    rows: int = 1
    """Batch size."""
    seed: int = 0
    """Seed of the runs, the noise and the actions."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: str = DEVICE
    """Where to train and decode."""
    folder: Path = Path("out/decoding")
    """Folder of the fresh worlds."""
    out: Path = Path("out/decoding.json")
    """Where the JSON goes."""

    def __post_init__(self) -> None:
        if self.data is None and not self.worlds:
            raise ValueError("data, worlds: expected a recording to train on or worlds, got neither. Give one of them.")
        if min(self.frames, self.rows, self.train_steps) < 1:
            numbers = f"{self.frames}, {self.rows} and {self.train_steps}"
            raise ValueError(f"frames, rows, train_steps: expected at least 1 of each, got {numbers}.")


def decodings(world: World) -> dict[str, DecodingConfig]:
    """The ways to decode a world; only one where nothing is solved by sweeps."""
    flow = world.model.config.flow
    if flow.kind == "frame-parallel" and flow.bands:
        return {"one pass a band": DecodingConfig()}
    ways = {SEQUENTIAL: DecodingConfig(block=1)}
    drafts = [draft for draft in get_args(Draft) if draft != "learned" or world.model.flow.drafter is not None]
    ways |= {f"Jacobi from {draft}": DecodingConfig(draft=draft) for draft in drafts}
    if world.decoding not in ways.values():
        ways["as calibrated"] = world.decoding
    return ways


def compare(world: World, frames: int, rows: int, seed: int) -> Rows:
    """Decodes the same frames in every way, each from the state that the first way left: same past, noise and actions."""
    world, ways = copy.copy(world), decodings(world)
    state = world.start(seed + np.arange(rows))
    policy = HeldRandomPolicy(batch_space(world.action_space, rows), (1, 8), seed=seed)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    for _ in tqdm(range(frames), desc="frames"):
        actions, before, reference = policy(None), state, None
        for name, decoding in ways.items():
            world.decoding, now = decoding, before[:]
            synchronise(world.device)
            began = time.perf_counter()
            now, output = world.step(now, actions)
            synchronise(world.device)
            ms = 1000 * (time.perf_counter() - began)
            if reference is None:
                state, reference = now, now.stream.tokens.clone()
            passes = output.sweeps.double().mean().item(), output.shallow_sweeps.double().mean().item()
            distance = (now.stream.tokens - reference).abs().max().item()
            found[name].append((*passes, ms, distance, output.certificate.max().item()))
    first = float(np.median([ms for _, _, ms, *_ in found[next(iter(ways))]]))
    table: Rows = []
    for name, measured in found.items():
        deep, shallow, times, distances, certificates = zip(*measured, strict=True)
        ms = float(np.median(times))
        table.append(
            {
                "decoding": name,
                "deep_passes": float(np.mean(deep)),
                "shallow_passes": float(np.mean(shallow)),
                "ms_a_step": ms,
                "times_faster": first / ms if SEQUENTIAL in ways else None,
                "distance_to_sequential": max(distances) if SEQUENTIAL in ways else None,
                "largest_certificate": max(certificates),
            }
        )
    return table


def fresh_worlds(data: Path, config: DecodingBenchmarkConfig) -> dict[str, TrainConfig]:
    """How to train the fresh worlds, by name.

    Raises:
        ValueError: if the recording's frames cannot be cut into a grid.
    """
    height, width = load_episodes(data).frames.shape[1:3]
    runs = {}
    for grid in config.grids:
        if grid < 1 or height != width or height % grid:
            raise ValueError(
                f"grids: expected divisors of the side of {data}'s square frames, got {grid} for frames of {height} x {width}. "
                "Choose other grids, or record frames that they divide with `sfv-world collect --size`."
            )
        patch = height // grid
        for kind in config.kinds:
            runs[f"{kind}-{grid**2}"] = TrainConfig(
                data=data,
                out=config.folder / f"{kind}-{grid**2}",
                preset=config.preset,
                steps=config.train_steps,
                patch=patch,
                window=config.window,
                clip=config.clip,
                batch=config.batch,
                held_out=config.held_out,
                validate_minutes=math.inf,
                seed=config.seed,
                denoiser=False,
                device=config.device,
                threads=config.threads,
                **VARIANTS[kind],
            )
    return runs


def describe(world: World) -> dict[str, Any]:
    """What a table says of its world: its tokens and for how long it was trained."""
    config, about = world.model.config.flow, world.about
    training = about.get("training", {})
    return {
        "kind": config.kind,
        "bands": list(config.bands),
        "tokens": config.tokens,
        "channels": config.channels,
        "trained_steps": about.get("steps"),
        "trained_minutes": about.get("minutes"),
        "trained_frames": about["steps"] * training["batch"] * training["clip"] if training else None,
        "held_out": about.get("held_out", {}),
    }


def main(config: DecodingBenchmarkConfig) -> None:
    """Trains, decodes and writes."""
    set_threads(config.threads)
    report = Report(config.out, config, config.device)
    runs: dict[str, TrainConfig | None] = dict.fromkeys(config.worlds)
    if config.data is not None:
        runs |= fresh_worlds(config.data, config)
    for name, run in runs.items():
        if run is None:
            world = load_world(name, config.device)
        else:
            print(f"\n{name}: {run.steps} steps of training")
            world, _ = trained(run, config.resume)
        about = describe(world)
        title = f"{name}: {about['tokens']} tokens of {about['channels']} channels, batch {config.rows}; "
        if about["trained_frames"] is None:
            title += "nothing is known of its training"
        else:
            nats = about["held_out"].get("nats_per_dim", math.nan)
            title += f"trained {about['trained_steps']:,} steps on {about['trained_frames']:,} frames, "
            title += f"{about['trained_minutes']:g} minutes; held out {nats / math.log(2):.2f} bits/dim"
        report.table(name, title, compare(world, config.frames, config.rows, config.seed), **about)


if __name__ == "__main__":
    command(main, DecodingBenchmarkConfig, __doc__)
