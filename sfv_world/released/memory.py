"""What the parts of a released model take, counted before anything is loaded."""

import math
from pathlib import Path

from sfv_world.codec.vae import ImageCodec, WanCodec
from sfv_world.memory import Need
from sfv_world.released.load import open_network

LIVE = 16  # Tensors of a VAE's largest size that are alive at once: activations, and what its convolutions remember.


def stored_numbers(folder: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """How many numbers a folder's safetensors hold in tensors whose names begin with one of `prefixes`, by their headers.

    Raises:
        ValueError: if a file cannot be read.
    """
    return sum(math.prod(shape) for name, shape in open_network(folder).shapes.items() if name.startswith(prefixes))


def codec_needs(codec: WanCodec | ImageCodec, height: int, width: int, size: int, videos: int = 1) -> list[Need]:
    """What a codec takes to decode a group of frames of some videos, at `size` bytes a number; of its activations about."""
    across = videos * codec.time * height * width / codec.patch**2
    return [
        Need("VAE", float(size * sum(parameter.numel() for parameter in codec.vae.parameters()))),
        Need("its activations", LIVE * size * codec.width * across),
    ]
