"""`sfv-world calibrate`: which size of block decodes a world fastest on this machine, stored with the world.

Only fixed points have blocks to choose: the raster blocks of a shallow flow and the autoregressive deep flow. Small blocks take
fewer passes over tokens that are not settled; large ones fewer, larger operations. Which wins depends on the device. Every
size gives the same frames, to the tolerance (`decoding.solver`).
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from gymnasium.vector.utils import batch_space
from pydantic import TypeAdapter
from tqdm import tqdm

from sfv_world.checkpoint import DECODING, replacing
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.given import DEVICE, check_counts
from sfv_world.loading import calibrated, load_world
from sfv_world.world import World


@dataclass(frozen=True)
class CalibrateConfig:
    """How to calibrate a world."""

    world: str
    """A shipped world's name or a folder; its `decoding.json` is written."""
    steps: int = 20
    """Steps that are timed for each size."""
    rows: int = 1
    """Rows stepped together."""
    device: str = DEVICE
    """The device to calibrate for."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "rows")


def block_sizes(world: World) -> list[int | None]:
    """Sizes worth trying, the whole frame first; nothing else where no fixed point is solved."""
    if world.direct:
        return [None]
    tokens = math.prod(world.model.config.codec.grid)
    sizes = [2**power for power in range(2, 10) if 2**power < tokens]
    return [None, *reversed(sizes)]


def seconds_a_step(world: World, steps: int, rows: int) -> float:
    """Median time of a step under held random actions, the first ones left out."""
    space = batch_space(world.action_space, rows)
    space.seed(0)
    state, times, warm_up = world.start(np.arange(rows)), [], 2
    for step in range(warm_up + steps):
        if step % 4 == 0:
            actions = space.sample()
        began = time.perf_counter()
        state, output = world.step(state, actions)
        output.frames.cpu()  # waits for the device
        times.append(time.perf_counter() - began)
    return float(np.median(times[warm_up:]))


def calibrate(config: CalibrateConfig) -> dict[int | None, float]:
    """Times every block size, stores the fastest with the world and returns the seconds of a step by size."""
    world = load_world(config.world, config.device)
    assert world.folder is not None, "a world that was loaded has a folder"
    base, found = world.decoding, {}
    bar = tqdm(block_sizes(world), unit="size")
    for size in bar:
        world.decoding = replace(base, block=size)
        found[size] = seconds_a_step(world, config.steps, config.rows)
        bar.write(f"block {size or 'whole frame'}: {1000 * found[size]:.1f} ms a step")
    best = min(found, key=lambda size: found[size])
    store(world.folder, config.device, replace(base, block=best))
    print(f"{world.folder / DECODING}: {torch.device(config.device).type} decodes with block {best or 'whole frame'}")
    return found


def store(folder: Path, device: str, decoding: DecodingConfig) -> None:
    """Keeps how to decode on one kind of device, beside what is known of others."""
    known = {kind: calibrated(folder, kind) for kind in ("cpu", "cuda", "mps")}
    known[torch.device(device).type] = decoding
    adapter = TypeAdapter(dict[str, DecodingConfig])
    with replacing(folder / DECODING) as beside:
        beside.write_bytes(adapter.dump_json({kind: value for kind, value in known.items() if value}, indent=2))
