"""What it takes to generate a clip, counted before anything is loaded, and what a device has."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sfv_world.codec.vae import ImageCodec, WanCodec
from sfv_world.released.load import open_network

LIVE = 16  # Tensors of a VAE's largest size that are alive at once: activations, and what its convolutions remember.


@dataclass(frozen=True)
class Need:
    """Something held while generating."""

    what: str
    size: float
    """Bytes."""


def stored_numbers(folder: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """How many numbers a folder's safetensors hold in tensors whose names begin with one of `prefixes`, by their headers.

    Raises:
        ValueError: if a file cannot be read.
    """
    return sum(math.prod(shape) for name, shape in open_network(folder).shapes.items() if name.startswith(prefixes))


def codec_needs(codec: WanCodec | ImageCodec, height: int, width: int, size: int) -> list[Need]:
    """What a codec takes to decode a group of frames, at `size` bytes a number; of its activations about."""
    across = codec.time * height * width / codec.patch**2
    return [
        Need("VAE", float(size * sum(parameter.numel() for parameter in codec.vae.parameters()))),
        Need("its activations", LIVE * size * codec.width * across),
    ]


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
