"""How fast a world steps: by batch size, decoding and horizon.

    python benchmarks/speed.py --world doom-basic

Prints tables and writes JSON with the machine, the versions and the commit. Run it alone on the machine.
"""

import json
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from sfv_world.decoding.solver import DecodingConfig
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.world import World, load_world


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure."""

    world: str = "doom-basic"
    """Name of a shipped world, or its folder."""
    batches: tuple[int, ...] = (1, 4, 16, 32)
    """Batch sizes."""
    steps: int = 60
    """Steps of each measurement."""
    horizon: int = 1000
    """Steps over which cost against horizon is measured."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: str = "cpu"
    """Where to step."""
    out: Path = Path("out/speed.json")
    """Where the JSON goes."""


def time_steps(world: World, rows: int, steps: int) -> dict[str, float]:
    """Steps of a batch of random play, each timed; sweeps and the largest certificate."""
    envs = WorldVectorEnv(rows, world=world, autoreset_mode="NextStep", max_episode_steps=75)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    times, sweeps, certificates = [], [], []
    for step in range(steps + 5):
        actions = envs.action_space.sample()
        began = time.perf_counter()
        infos = envs.step(actions)[4]
        if step >= 5:  # warm
            times.append(time.perf_counter() - began)
            sweeps.extend(infos["sweeps"][infos["_sweeps"]])
            certificates.append(infos["certificate"].max())
    return {
        "frames_per_second": rows / float(np.mean(times)),
        "p50_ms": 1000 * float(np.percentile(times, 50)),
        "p99_ms": 1000 * float(np.percentile(times, 99)),
        "deep_sweeps": float(np.mean(sweeps)),
        "largest_certificate": float(np.max(certificates)),
    }


def by_batch(world: World, config: SpeedConfig) -> list[dict[str, Any]]:
    """Frames a second against batch size."""
    return [{"batch": rows, **time_steps(world, rows, config.steps)} for rows in config.batches]


def by_decoding(world: World, config: SpeedConfig) -> list[dict[str, Any]]:
    """Sequential decoding against Jacobi from each draft, one row: passes, milliseconds, distance to the sequential answer."""
    state = world.start([0])
    variants = {"sequential": DecodingConfig(block=1)}
    variants |= {
        f"Jacobi from {draft}": DecodingConfig(draft=draft) for draft in ("fields", "tokens", "noise", "zeros")
    }
    found, exact = [], None
    for name, decoding in variants.items():
        world.decoding, now = decoding, state[:]
        times, deep, shallow, tokens = [], [], [], []
        for _ in range(max(8, config.steps // 4)):
            began = time.perf_counter()
            now, output = world.step(now, np.zeros(1, np.int64))
            times.append(time.perf_counter() - began)
            deep.append(output.sweeps.item())
            shallow.append(output.shallow_sweeps.item())
            tokens.append(now.stream.tokens.cpu())
        exact = exact or tokens
        error = (tokens[0] - exact[0]).abs().max().item()
        row = {"decoding": name, "ms": 1000 * float(np.median(times)), "deep_passes": float(np.mean(deep))}
        found.append({**row, "shallow_passes": float(np.mean(shallow)), "distance_to_sequential": error})
    world.decoding = DecodingConfig()
    return found


def by_horizon(world: World, config: SpeedConfig) -> list[dict[str, Any]]:
    """Milliseconds a step, one row, as the rollout grows: constant cost means equal rows."""
    state, found, times = world.start([0]), [], []
    marks = {int(mark) for mark in np.geomspace(10, config.horizon, 5)}
    for step in range(1, config.horizon + 1):
        began = time.perf_counter()
        state, _ = world.step(state, np.array([step % 3]))
        times.append(time.perf_counter() - began)
        if step in marks:
            found.append({"step": step, "ms": 1000 * float(np.median(times[-min(100, step) :]))})
    cache = state.stream.cache
    size = cache.keys.nbytes + cache.values.nbytes
    return [{**row, "cache_bytes_per_row": size} for row in found]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    for row in rows:
        cells = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(config: SpeedConfig) -> None:
    """Measures and writes."""
    if config.threads:
        torch.set_num_threads(config.threads)
    world = load_world(config.world, config.device)
    found = {
        "world": world.name,
        "machine": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
    }
    print(json.dumps(found))
    for name, measure in {"batch": by_batch, "decoding": by_decoding, "horizon": by_horizon}.items():
        found[name] = measure(world, config)
        print(f"\n{table(found[name])}", flush=True)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    config.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
