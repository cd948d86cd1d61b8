"""The randomness of rows: a pure function of a row's seed and its frame's number since the reset.

So the same seed and actions give the same frames, whatever other rows do and however often a state was copied, saved or moved.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import SupportsInt

import numpy as np
from jaxtyping import Float, Int

ROWS_IN_TURN = 16
"""Fewer rows are drawn one after the other: threads would cost more than they save."""


def noise(
    seeds: Int[np.ndarray, "b"], ages: Int[np.ndarray, "b"], shape: tuple[int, ...]
) -> Float[np.ndarray, "b *shape"]:
    """Standard normal: what the frames numbered `ages` are imagined from."""
    normal = np.empty((len(seeds), *shape), np.float32)

    def draw(row: int) -> None:
        _generator(seeds[row], ages[row], 0).standard_normal(dtype=np.float32, out=normal[row])

    _for_all(len(seeds), draw)
    return normal


def noise_of_observed(
    seeds: Int[np.ndarray, "b"],
    ages: Int[np.ndarray, "b"],
    steps: int,
    frame: tuple[int, ...],
    signal: tuple[int, ...],
) -> tuple[Float[np.ndarray, "b t height width 3"], Float[np.ndarray, "b t h w k"]]:
    """(uniform, normal): what is added to so many observed frames and their signals, the first of each row numbered `ages`.

    The normal numbers are those of `noise`: a frame is imagined or observed. Who observes what was imagined takes other seeds.
    """
    uniform = np.empty((len(seeds), steps, *frame), np.float32)
    normal = np.empty((len(seeds), steps, *signal), np.float32)

    def draw(row: int) -> None:
        for step in range(steps):
            generator = _generator(seeds[row], ages[row] + step, 0)
            generator.standard_normal(dtype=np.float32, out=normal[row, step])
            generator.random(dtype=np.float32, out=uniform[row, step])

    _for_all(len(seeds), draw)
    return uniform, normal


def draws(seeds: Int[np.ndarray, "b"], ages: Int[np.ndarray, "b"]) -> Float[np.ndarray, "b"]:
    """Uniform in [0, 1): what decides whether the frames numbered `ages` end their episodes."""
    rows = zip(seeds, ages, strict=True)
    return np.stack([_generator(seed, age, 1).random(dtype=np.float32) for seed, age in rows])


def _generator(seed: SupportsInt, age: SupportsInt, purpose: int) -> np.random.Generator:
    """A counter-based generator (Philox) for one purpose of one frame of one row."""
    return np.random.Generator(np.random.Philox(key=[int(seed), 2 * int(age) + purpose]))


def _for_all(rows: int, draw: Callable[[int], None]) -> None:
    """Draws every row, many of them side by side: NumPy fills an array without holding the interpreter's lock."""
    if rows < ROWS_IN_TURN:
        for row in range(rows):
            draw(row)
    else:
        list(_pool().map(draw, range(rows)))  # the list asks for every result, and so for every error


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="chance")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads stay behind in the parent
