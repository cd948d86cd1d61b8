"""What a device has free: what does not fit is told before it is begun."""

import math
import os
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
    """Bytes that a device has free; on a CPU what can be had without swapping, or all there is, or infinity if none is told."""
    if device.type == "cuda":  # what torch has reserved for later, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + kept)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        names = getattr(os, "sysconf_names", {})
        if {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= names.keys():
            return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        return math.inf


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
