"""How fast a world steps: by batch size and horizon, where the time goes, and which goals are reached.

    python benchmarks/speed.py --world doom-basic

Prints tables and writes JSON with the machine, the versions and the commit. Run it alone on the machine.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from bounds import bounds_of_steps, measure_rates, share_of_steps
from gymnasium.vector.utils import batch_space
from report import Report, Rows, command, resident_bytes, synchronise
from torch import Tensor
from tqdm import tqdm

from sfv_world.agents.policies import HeldRandomPolicy
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.given import DEVICE, set_threads
from sfv_world.loading import load_world
from sfv_world.state import WorldOutput, WorldState
from sfv_world.world import World

GOALS = {"cpu": ("two CPU cores", {1: 60, 32: 150}), "cuda": ("an H200", {1: 100, 256: 5000})}
"""Frames a second by batch size, and the machine they are meant for, by type of device."""
CERTIFICATE = 1e-3
"""Certificates are to stay below this."""
SWEEPS = 4
"""Deep sweeps a frame are to be this few on average."""
WARM_UP = 5
"""Steps before those that are timed, beside one at each place of the world's ring, where a recorded world records."""


@dataclass(frozen=True)
class SpeedConfig:
    """What to measure."""

    world: str = "doom-basic"
    """Name of a shipped world, or its folder."""
    batches: tuple[int, ...] = (1, 4, 16, 32, 64, 128, 256)
    """Batch sizes."""
    steps: int = 500
    """Most steps of each measurement."""
    seconds: float = 30.0
    """A measurement stops after so many seconds, but not before 10 steps."""
    horizon: int = 10_000
    """Steps over which cost against horizon is measured."""
    output: Literal["numpy", "torch"] = "numpy"
    """What steps give: arrays, or tensors that stay on the device."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    compile: bool = False
    """Whether to compile the world first (`World.compiled`)."""
    record: bool = False
    """Whether to record its steps as CUDA graphs (`World.recorded`)."""
    device: str = DEVICE
    """Where to step."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the Transformers' layers compute in."""
    out: Path = Path("out/speed.json")
    """Where the JSON goes."""

    def __post_init__(self) -> None:
        for name, numbers in {"batches": self.batches, "steps": [self.steps], "horizon": [self.horizon]}.items():
            if not numbers or min(numbers) < 1:
                raise ValueError(f"{name}: expected numbers of at least 1, got {getattr(self, name)}. Leave it out.")


class Timing(NamedTuple):
    """Steps of a batch of random play, each timed."""

    rows: int
    seconds: np.ndarray
    """Of every step."""
    begins: np.ndarray
    """Whether some row began a new episode in a step."""
    deep_sweeps: float
    """Mean number a frame."""
    shallow_sweeps: float
    """Mean number a frame."""
    certificate: float
    """The largest."""

    @property
    def frames_per_second(self) -> float:
        """Over all steps, those that begin episodes included."""
        return self.rows / float(self.seconds.mean())


def time_steps(world: World, rows: int, steps: int, seconds: float, output: str = "numpy") -> Timing:
    """Times at most so many steps of a batch, and no longer than so many seconds if that is 10 steps or more."""
    envs = WorldVectorEnv(rows, world=world, autoreset_mode="NextStep", max_episode_steps=75, output=output)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    outputs: list[tuple[Tensor, ...]] = []
    step_world = envs.world.step

    def recorded(*arguments: Any) -> tuple[WorldState, WorldOutput]:
        state, found = step_world(*arguments)
        outputs.append((found.sweeps, found.shallow_sweeps, found.certificate))
        return state, found

    vars(envs.world)["step"] = recorded  # the environment's own copy of the world
    times, begins, ended = [], [], np.zeros(rows, bool)
    warm_up = WARM_UP + world.model.config.flow.deep.window
    for step in range(steps + warm_up):
        actions = envs.action_space.sample()
        synchronise(world.device)
        began = time.perf_counter()
        _, _, terminated, truncated, _ = envs.step(actions)
        synchronise(world.device)
        if step >= warm_up:
            times.append(time.perf_counter() - began)
            begins.append(bool(ended.any()))
        ended = torch.as_tensor(terminated | truncated).cpu().numpy()
        if len(times) >= 10 and sum(times) > seconds:
            break
    deep, shallow, certificates = (torch.cat(found).double() for found in zip(*outputs[warm_up:], strict=True))
    means = deep.mean().item(), shallow.mean().item()
    return Timing(rows, np.array(times), np.array(begins), *means, certificates.max().item())


def by_batch(timings: list[Timing], goals: dict[int, int]) -> Rows:
    """Frames a second against batch size."""
    return [
        {
            "batch": timing.rows,
            "frames_per_second": timing.frames_per_second,
            "goal": goals.get(timing.rows),
            "verdict": _verdict(timing.frames_per_second >= goals[timing.rows]) if timing.rows in goals else None,
            "ms_a_step": 1000 * float(timing.seconds.mean()),
            "deep_sweeps": timing.deep_sweeps,
            "shallow_sweeps": timing.shallow_sweeps,
            "largest_certificate": timing.certificate,
            "steps": len(timing.seconds),
        }
        for timing in timings
    ]


def latency(timing: Timing) -> Rows:
    """How long a caller waits, by what a step does."""
    kinds = {"imagines the next frame": ~timing.begins, "begins a new episode": timing.begins}
    return [
        {
            "a_step_that": name,
            "p50_ms": 1000 * float(np.percentile(timing.seconds[which], 50)),
            "p99_ms": 1000 * float(np.percentile(timing.seconds[which], 99)),
            "steps": int(which.sum()),
        }
        for name, which in kinds.items()
        if which.any()
    ]


def by_horizon(world: World, horizon: int) -> Rows:
    """Cost of one row as its rollout grows, under held random actions and never reset: constant cost means equal rows."""
    state, policy = world.start([0]), HeldRandomPolicy(batch_space(world.action_space, 1), (1, 8), seed=0)
    marks = {round(mark) for mark in np.geomspace(min(10, horizon), horizon, 7)}
    found: Rows = []
    times, sweeps, certificates = [], [], []
    for step in tqdm(range(1, horizon + 1), desc="horizon"):
        actions = policy(None)
        synchronise(world.device)
        began = time.perf_counter()
        state, output = world.step(state, actions)
        synchronise(world.device)
        times.append(time.perf_counter() - began)
        sweeps.append(output.shallow_sweeps.item())
        certificates.append(output.certificate.item())
        if step in marks:
            cache = state.stream.cache
            row = {
                "step": step,
                "ms_a_step": 1000 * float(np.median(times)),
                "shallow_sweeps": float(np.mean(sweeps)),
                "largest_certificate": max(certificates),
                "cache_bytes": cache.keys.nbytes + cache.values.nbytes,
                "resident_mb": resident_bytes() / 1e6,
            }
            if world.device.type == "cuda":
                row["device_mb"] = torch.cuda.memory_allocated(world.device) / 1e6
            found.append(row)
            times, sweeps, certificates = [], [], []
    return found


def verdicts(timings: list[Timing], shares: Rows, bounds: Rows, device: str) -> Rows:
    """Every goal, what was found, and what bounds a speed that misses its own."""
    machine, goals = GOALS[device]
    certificate, sweeps = max(timing.certificate for timing in timings), timings[0].deep_sweeps
    rows: Rows = [
        _goal(f"certificates below {CERTIFICATE:g}", certificate, certificate < CERTIFICATE),
        _goal(f"at most {SWEEPS} deep sweeps a frame on average", sweeps, sweeps <= SWEEPS),
    ]
    for timing in timings:
        if timing.rows in goals:
            name = f"at least {goals[timing.rows]:,} frames/s at batch {timing.rows} on {machine}"
            reached = timing.frames_per_second >= goals[timing.rows]
            why = None if reached else _reason(timing, shares, bounds)
            rows.append(_goal(name, timing.frames_per_second, reached, why))
    return rows


def _goal(name: str, found: float, reached: bool, why: str | None = None) -> dict[str, Any]:
    return {"goal": name, "found": found, "verdict": _verdict(reached), "what_bounds_it": why}


def _reason(timing: Timing, shares: Rows, bounds: Rows) -> str:
    part = max((row for row in shares if row["batch"] == timing.rows), key=lambda row: row["share"])
    needs = next(row for row in bounds if row["batch"] == timing.rows)
    return (
        f"{part['share']:.0%} of a step is the {part['part']} ({timing.deep_sweeps:.1f} deep and {timing.shallow_sweeps:.1f} "
        f"shallow passes a frame); most of its {needs['ms_a_step']:.1f} ms is {needs['most']}"
    )


def _verdict(reached: bool) -> str:
    return "reached" if reached else "missed"


def load(config: SpeedConfig) -> World:
    """The world as it is to be measured, but for recordings: what is replayed cannot be taken apart."""
    world = load_world(config.world, config.device, dtype=getattr(torch, config.dtype))
    return world.compiled() if config.compile else world


def main(config: SpeedConfig) -> None:
    """Measures and writes."""
    set_threads(config.threads)
    plain = load(config)
    world = load(config).recorded() if config.record else plain
    device = world.device.type
    machine, goals = GOALS[device]
    report = Report(config.out, config, config.device)
    timings = [
        time_steps(world, rows, config.steps, config.seconds, config.output)
        for rows in tqdm(config.batches, desc="batches")
    ]
    title = f"Env steps of {world.name} by batch size, random play; goals are for {machine}"
    report.table("batch", title, by_batch(timings, goals))
    first = timings[0]
    report.table("latency", f"Latency at batch {first.rows}", latency(first))

    profiled = [timing.rows for timing in timings if timing.rows in goals] or [first.rows]
    rates = measure_rates(world.device)
    profile_steps = min(40, config.steps)
    shares = [row for rows in profiled for row in share_of_steps(plain, rows, profile_steps, config.output)]
    report.table("share", f"Where a step's time goes{', without recordings' if config.record else ''}", shares)
    measured = {timing.rows: 1000 * float(timing.seconds.mean()) for timing in timings}
    bounds = [bounds_of_steps(plain, rows, min(5, config.steps), rates, measured[rows]) for rows in profiled]
    title = (
        f"Of a step's ms, what would do at the machine's measured rates: {rates.flops / 1e9:,.0f} GFLOP/s in float32 matrix "
        f"products, {rates.bytes / 1e9:,.0f} GB/s in copies, {1e6 * rates.start:.1f} us for the smallest operation"
    )
    report.table("bounds", title, bounds, rates=rates._asdict())

    report.table("horizon", "Cost against horizon, one row", by_horizon(world, config.horizon))
    report.table("goals", "Goals", verdicts(timings, shares, bounds, device))


if __name__ == "__main__":
    command(main, SpeedConfig, __doc__)
