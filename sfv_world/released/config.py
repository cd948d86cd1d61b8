"""The shape of a model in the released layout, by the names its own configurations use, and the published sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

DENOISER_LAYERS = 8
LAYOUT = "starflow"
"""What the folder of a converted model calls itself."""
# What the released models all have, and this implementation takes for granted.
FIXED: dict[str, Any] = {
    "rope": True,
    "sos": True,
    "cond_top_only": True,
    "use_softplus": True,
    "use_final_norm": True,
    "soft_clip": 4,
    "seq_order": "L2R",
    "norm_type": "layer_norm",
}
DERIVED = ("num_blocks", "img_size")  # said twice, or of training only


@dataclass(frozen=True)
class ReleasedConfig:
    """Shape of a released model: STARFlow (images) or STARFlow-V (videos)."""

    in_channels: int
    """Channels of a codec latent."""
    channels: int
    """Width of the shallow blocks and of the denoiser."""
    layers_per_block: tuple[int, ...]
    """Layers of every shallow block and, last, of the deep one."""
    pt_seq_len: int
    """Side of the square that spatial positions are scaled to, in position units; text spans as many in time."""
    txt_size: int
    """Text tokens, padded to this many."""
    txt_dim: int
    """Channels of a text state."""
    patch_size: int = 1
    """Side of a token, in latents."""
    top_block_channels: int | None = None
    """Width of the deep block; none: as the shallow blocks."""
    head_dim: int = 64
    """Channels of an attention head."""
    shallow_block_local: bool = False
    """Whether shallow blocks see one frame of a video; without it the model is one of images."""
    learnable_self_denoiser: bool = False
    """Whether a denoiser is part of the model."""
    conditional_denoiser: bool = False
    """Whether the denoiser reads the text."""
    temporal_causal: int = 0
    """Frames the denoiser sees from its own on: 1 its own, 2 one ahead, 0 all of the video."""
    denoiser_window: int = 10
    """Frames before those that it sees too."""

    def __post_init__(self) -> None:
        if len(self.layers_per_block) < 1 or min(self.layers_per_block) < 1:
            raise ValueError(f"layers_per_block must be one positive number a block, got {self.layers_per_block}")
        for name in ("in_channels", "patch_size", "pt_seq_len", "txt_size", "txt_dim", "denoiser_window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.head_dim < 16 or self.head_dim % 16:
            raise ValueError(
                f"head_dim must be a positive multiple of 16 (rotary pairs split 3:3:2), got {self.head_dim}"
            )
        for name, width in (("channels", self.channels), ("top_block_channels", self.deep_width)):
            if width < 1 or width % self.head_dim:
                raise ValueError(f"{name} must be a positive multiple of head_dim {self.head_dim}, got {width}")
        if self.temporal_causal not in (0, 1, 2):
            raise ValueError(f"temporal_causal must be 0, 1 or 2, got {self.temporal_causal}")

    @property
    def token_channels(self) -> int:
        """Channels of a token."""
        return self.in_channels * self.patch_size**2

    @property
    def deep_width(self) -> int:
        """Width of the deep block."""
        return self.channels if self.top_block_channels is None else self.top_block_channels

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on latents in training, which no tensor tells: that of the published models."""
        return 0.5 if self.shallow_block_local else 0.3


def starflow_v_7b() -> ReleasedConfig:
    """STARFlow-V at 480p: Wan2.2 latents (48 channels, 16x in space, 4x in time), FLAN-T5-XL text, 256 tokens of it."""
    return ReleasedConfig(
        in_channels=48,
        channels=3072,
        top_block_channels=4096,
        layers_per_block=(2, 2, 2, 2, 2, 24),
        pt_seq_len=32,
        txt_size=256,
        txt_dim=2048,
        shallow_block_local=True,
        learnable_self_denoiser=True,
        conditional_denoiser=True,
        temporal_causal=2,
    )


def starflow_3b() -> ReleasedConfig:
    """STARFlow for 256 x 256 images: SD-VAE latents (4 channels, 32 x 32), FLAN-T5-XL text, 128 tokens of it."""
    return ReleasedConfig(
        in_channels=4,
        channels=3072,
        layers_per_block=(2, 2, 2, 2, 2, 24),
        pt_seq_len=32,
        txt_size=128,
        txt_dim=2048,
    )


PRESETS = {"starflow-v-7b": starflow_v_7b, "starflow-3b": starflow_3b}


def parse_config(values: Mapping[str, Any], source: str) -> ReleasedConfig:
    """A configuration from a mapping in the released names; `source` is what errors call it.

    Raises:
        ValueError: if a name is unknown or missing, or a value is of a variant that no released model uses.
    """
    if "action_space" in values:
        raise ValueError(f"{source}: expected a released model, got a world, whose README.md says what it is.")
    known = {field.name for field in fields(ReleasedConfig)}
    if unknown := sorted(values.keys() - known - FIXED.keys() - set(DERIVED)):
        raise ValueError(f"{source}: unknown names {unknown}; expected some of {sorted(known)}.")
    for name, expected in FIXED.items():
        if values.get(name, expected) != expected:
            raise ValueError(
                f"{source}: {name} must be {expected!r}, got {values[name]!r}; other variants are not read."
            )
    try:
        config = TypeAdapter(ReleasedConfig).validate_python({name: values[name] for name in values.keys() & known})
    except ValidationError as error:
        problems = "; ".join(": ".join([*map(str, e["loc"]), e["msg"]]) for e in error.errors())
        raise ValueError(f"{source}: not a configuration of the released layout ({problems}).") from None
    if values.get("num_blocks", len(config.layers_per_block)) != len(config.layers_per_block):
        raise ValueError(
            f"{source}: num_blocks {values['num_blocks']} does not match layers_per_block {config.layers_per_block}."
        )
    return config


def find_config(name: str | Path) -> ReleasedConfig:
    """A configuration by the name of a preset, or from a JSON file or the folder that holds it as `config.json`.

    Raises:
        ValueError: if there is no such preset or file, or it holds something else.
    """
    if str(name) in PRESETS:
        return PRESETS[str(name)]()
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    try:
        values = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"config {name}: expected a JSON file or one of {sorted(PRESETS)}, found neither.") from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected a configuration in JSON, got a file that cannot be read ({error})."
        ) from None
    if isinstance(values, dict) and isinstance(values.get("config"), dict):
        values = values["config"]
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object of a configuration, got {type(values).__name__}.")
    return parse_config(values, str(path))
