"""What a device has free: what does not fit is told before it is begun."""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

UNASKED = 2**28
"""Bytes of rows that are made without asking what is free."""


@dataclass(frozen=True)
class Need:
    """Something held at once."""

    what: str
    size: float
    """Bytes."""


def available(device: torch.device) -> float:
    """Bytes that a device has free; on a CPU what can be had without swapping, or all there is, or infinity if none is told.

    Containers and batch systems often grant less than the machine has: what control groups leave counts, too.
    """
    if device.type == "cuda":  # what torch has reserved for later, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
        return min(free, left_by_groups())
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return math.inf


def left_by_groups(root: Path = Path("/")) -> float:
    """Bytes that the control groups of this process leave it, of both versions; infinity where nothing is limited.

    Args:
        root: where `proc` and `sys` are.
    """
    left = math.inf
    try:
        groups = [line.split(":", 2)[1:] for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return left
    for controllers, name in groups:
        folder, limit, used = root / "sys/fs/cgroup", "memory.max", "memory.current"
        if controllers:
            folder, limit, used = folder / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        if controllers and "memory" not in controllers.split(","):
            continue
        own = folder / name.lstrip("/")
        for group in {folder, own, *(parent for parent in own.parents if folder in parent.parents)}:
            try:
                most, held = (int((group / file).read_text()) for file in (limit, used))
                cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
            except (OSError, ValueError):  # no such group, or "max": no limit
                continue
            left = min(left, float(most - held + int(cached[1] if cached else 0)))
    return left


def check_memory(needs: list[Need], device: torch.device, remedy: str) -> None:
    """Raises ValueError if what is needed at once is more than the device has free, and says what it is."""
    total, free = sum(need.size for need in needs), available(device)
    if total > free:
        parts = ", ".join(f"{need.what} {need.size / 1e9:.2f}" for need in needs)
        raise ValueError(
            f"memory: expected about {total / 1e9:.2f} GB free on {device} ({parts}), got {free / 1e9:.2f} GB. {remedy}"
        )


def check_rows(rows: int, size: float, device: torch.device) -> None:
    """Raises a ValueError if so many rows of a world, of about `size` bytes each, are more than the device has room for."""
    if rows * size > UNASKED:
        check_memory([Need(f"{rows} rows", rows * size)], device, "Give fewer rows.")
