"""The backbone: a released model and its VAE, frozen, in the folder that `sfv-world convert` makes."""

import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sfv_world.codec.vae import ImageCodec, WanCodec, find_codec, load_codec
from sfv_world.codec.video import VideoCodec, VideoCodecConfig
from sfv_world.memory import check_memory
from sfv_world.pretrained import read_config
from sfv_world.released.config import LAYOUT, ReleasedConfig, find_config
from sfv_world.released.load import checksum, load_released, open_checkpoint, open_network
from sfv_world.released.model import ReleasedFlow
from sfv_world.released.plan import sampling_needs


def find_parts(
    folder: Path, vae: Path | None = None, name: str = "world"
) -> tuple[ReleasedConfig, WanCodec | ImageCodec]:
    """The shape of a converted model and its codec without weights, by their configurations alone.

    Args:
        folder: of the model.
        vae: folder of its VAE; none: `vae` in the model's.
        name: how errors call the folder.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if something is missing or does not fit.
    """
    if read_config(folder, "a converted model").get("layout") != LAYOUT:
        raise ValueError(
            f"{name}: expected a folder made by `sfv-world convert`, got {folder}, which holds another kind of world. "
            "Worlds that were trained here are shown by `sfv-world demo`."
        )
    shape, codec = find_config(folder), find_codec(vae or folder / "vae")
    if codec.channels != shape.in_channels:
        raise ValueError(
            f"vae: expected latents of {shape.in_channels} channels, got a VAE of {codec.channels}. Give the model's."
        )
    return shape, codec


def check_text_encoder(folder: Path, shape: ReleasedConfig) -> None:
    """Raises a ValueError if a folder does not hold the T5 encoder of a model of this shape, by its configuration alone."""
    states = read_config(folder, "a T5 encoder").get("d_model")
    if states != shape.txt_dim:
        raise ValueError(f"text_encoder: expected states of {shape.txt_dim} channels, got {states}. Give the model's.")


@dataclass(frozen=True)
class Backbone:
    """A frozen model of videos and its codec: what worlds stand on without owning it. Copies of them share it."""

    flow: ReleasedFlow
    codec: VideoCodec

    def __deepcopy__(self, memo: dict[int, Any]) -> "Backbone":
        """Itself."""
        return self

    @classmethod
    def outline(cls, folder: Path, height: int, width: int, name: str = "backbone") -> "Backbone":
        """Its shape, for frames of so many pixels, without any weights; they are on the meta device.

        Raises:
            ImportError: if `diffusers` is not installed.
            ValueError: if the folder holds no model of videos with its VAE, or the frames do not fit it.
        """
        shape, codec = find_parts(folder, name=name)
        if not shape.shallow_block_local:
            raise ValueError(f"{name}: expected a model of videos, got one of images in {folder}.")
        with torch.device("meta"):
            return cls(ReleasedFlow(shape), as_codec(shape, codec, height, width))

    @staticmethod
    def check(
        folder: Path,
        height: int,
        width: int,
        device: str | torch.device,
        frames: int,
        dtype: torch.dtype | None = None,
        trained: int = 0,
    ) -> None:
        """Raises a ValueError if it does not fit into memory, for chunks of latent frames and, `trained` on, so many clips."""
        device = torch.device(device)
        layers = _layers(device, dtype)
        needs = sampling_needs(*find_parts(folder), height, width, frames, layers, trained=trained)
        check_memory(needs, device, "Give a larger device, frames of fewer pixels, or fewer clips a batch.")

    @classmethod
    def load(
        cls,
        folder: Path,
        height: int,
        width: int,
        device: str | torch.device,
        frames: int,
        dtype: torch.dtype | None = None,
    ) -> "Backbone":
        """The whole of it, for chunks of latent frames of so many pixels; layers of no `dtype` are bfloat16 on CUDA, else float32.

        Raises:
            ImportError: if `diffusers` is not installed.
            ValueError: if it cannot be read or does not fit into memory.
        """
        device = torch.device(device)
        cls.check(folder, height, width, device, frames, dtype)
        dtype = getattr(torch, _layers(device, dtype))
        flow = load_released(folder, device=device, dtype=dtype).requires_grad_(False)
        return cls(flow, as_codec(flow.config, load_codec(folder / "vae", device, dtype), height, width).to(device))


def _layers(device: torch.device, dtype: torch.dtype | None) -> Literal["bfloat16", "float32"]:
    """What its layers compute in."""
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def as_codec(shape: ReleasedConfig, vae: WanCodec | ImageCodec, height: int, width: int) -> VideoCodec:
    """A world's codec of a model's latents.

    Raises:
        ValueError: if frames of that size are not whole tokens.
    """
    return VideoCodec(VideoCodecConfig(height, width, vae.space, vae.time, vae.channels, shape.patch_size), vae)


def fingerprint(folder: Path) -> int:
    """Checksum of a model and its VAE: what they say of themselves, and that of their tensors.

    Raises:
        ValueError: if the folder holds no model with its VAE that can be read.
    """
    vae = {name: value for name, value in read_config(folder / "vae", "a VAE").items() if not name.startswith("_")}
    said = zlib.crc32(json.dumps([asdict(find_config(folder)), vae], sort_keys=True).encode())
    return checksum(open_network(folder / "vae"), checksum(open_checkpoint(folder), said))
