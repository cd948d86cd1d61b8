"""`sfv-world info`: what a released model takes, in memory and in time, before any weight is loaded.

Counted from shapes. Times are a roofline: arithmetic at a share of the peak, or the bytes that must be read, whichever is longer.
They are lower bounds that neither launch overhead nor convergence is part of; measure before you promise.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import tyro

from sfv_world.codec.vae import ImageCodec, WanCodec
from sfv_world.memory import Need
from sfv_world.released.cache import cache_size
from sfv_world.released.config import DENOISER_LAYERS, ReleasedConfig, find_config
from sfv_world.released.load import expected_shapes
from sfv_world.released.memory import codec_needs


@dataclass(frozen=True)
class InfoConfig:
    """A model, a video and a device. The defaults are five seconds of 480p on one H200."""

    model: Annotated[str, tyro.conf.Positional] = "starflow-v-7b"
    """A preset, a configuration's JSON file or a converted folder."""
    frames: int | None = None
    """Latent frames; none: 21, or the one that a model of images has."""
    rows: int | None = None
    """Rows of tokens in a frame; none: 30, or of images as many as in training."""
    columns: int | None = None
    """Columns of tokens in a frame; none: 53, or of images as many as in training."""
    batch: int = 1
    """Videos at once."""
    devices: int = 1
    """Devices that share the weights of the deep block (`torchrun`)."""
    guided: bool = True
    """Whether sampling is guided, which doubles the deep block's rows."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What the layers compute in."""
    block: int = 64
    """Tokens that a Jacobi sweep decodes at once."""
    sweeps: float = 4.0
    """Mean sweeps a block."""
    memory: float = 141.0
    """The device's memory, in GB."""
    bandwidth: float = 4800.0
    """The device's memory bandwidth, in GB/s."""
    tflops: float = 989.0
    """The device's peak in that dtype, in Tflop/s."""
    share: float = 0.4
    """The share of the peak that large matrix products reach."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not value > 0 and name != "guided":
                raise ValueError(f"{name} must be positive, got {value}")

    def size(self, model: ReleasedConfig) -> tuple[int, int, int]:
        """Latent frames, rows and columns of tokens."""
        usual = (21, 30, 53) if model.shallow_block_local else (1, model.pt_seq_len, model.pt_seq_len)
        frames, rows, columns = (
            asked or other for asked, other in zip((self.frames, self.rows, self.columns), usual, strict=True)
        )
        return frames, rows, columns


def parameter_counts(config: ReleasedConfig) -> dict[str, int]:
    """Parameters of the deep block, the shallow blocks and the denoiser."""
    counts = {"deep": 0, "shallow": 0, "denoiser": 0}
    deep = f"blocks.{len(config.layers_per_block) - 1}."
    for name, shape in expected_shapes(config).items():
        part = "deep" if name.startswith(deep) else "shallow" if name.startswith("blocks.") else "denoiser"
        counts[part] += math.prod(shape)
    return counts


@dataclass(frozen=True)
class Plan:
    """Bytes and seconds of one model, video and device."""

    memory: dict[str, float]
    """What is held while sampling, in GB."""
    seconds: dict[str, float]
    """Lower bounds of one pass or decode of the whole batch."""


def plan(config: ReleasedConfig, work: InfoConfig) -> Plan:
    """Counts memory and time.

    Raises:
        ValueError: if a model of images is given more than one frame.
    """
    frames, rows, columns = work.size(config)
    if frames > 1 and not config.shallow_block_local:
        raise ValueError(f"frames must be 1 for a model of images ({work.model}), got {frames}. Give --frames 1.")
    size = 2 if work.dtype == "bfloat16" else 4
    place = rows * columns
    slots, sequences = config.txt_size + frames * place, work.batch * (2 if work.guided else 1)
    depth, shallow = config.layers_per_block[-1], config.layers_per_block[:-1]
    deep_weights, shallow_weights, denoiser_weights = (
        float(count * size) for count in parameter_counts(config).values()
    )
    deep_cache = sequences * cache_size(depth, config.deep_width, slots, size)
    shallow_cache = work.batch * cache_size(max(shallow, default=0), config.channels, place, size)
    memory = {
        "weights": deep_weights / work.devices + shallow_weights + denoiser_weights,
        "keys and values, deep block": deep_cache,
        "keys and values, one shallow block, one frame": shallow_cache,
        # The residual stream, queries, keys and values, and the inside of the MLP before and after its activation.
        "activations of a parallel pass, about": 14 * config.deep_width * slots * size * work.batch,
    }
    if not config.learnable_self_denoiser:  # cleaned by the model's own score, a backward pass through all layers
        kept = sum(config.layers_per_block) * memory["activations of a parallel pass, about"]
        memory["activations kept for the score, about"] = kept

    def seconds(flops: float, read: float, passes: float = 1.0) -> float:
        return max(flops / (work.tflops * 1e12 * work.share), passes * read / (work.bandwidth * 1e9))

    # Two operations a weight and token, and causal attention at half of 4 S^2 a channel and layer.
    tokens = work.batch * frames * place
    deep = 2 * deep_weights / size * slots + 2 * slots**2 * config.deep_width * depth
    local = 2 * shallow_weights / size * tokens + 2 * tokens * place * config.channels * sum(shallow)
    seen = frames if config.temporal_causal == 0 else min(frames, config.denoiser_window + 1)
    denoiser = 2 * denoiser_weights / size + 4 * seen * place * config.channels * DENOISER_LAYERS
    shallow_read = shallow_weights + len(shallow) * shallow_cache / 2
    deep_read, deep_passes = deep_weights + deep_cache / 2, float(frames * place)
    faster = work.block / work.sweeps
    forward = seconds(deep * work.batch, deep_weights) + seconds(local, shallow_weights)
    times = {
        "log-likelihood of the video": forward,
        "deep block, token by token": seconds(deep * sequences, deep_read, deep_passes),
        f"deep block, Jacobi ({work.sweeps:g} sweeps a block of {work.block})": seconds(
            deep * sequences * work.sweeps, deep_read, deep_passes / faster
        ),
        "shallow blocks, token by token": seconds(local, shallow_read, float(frames * place)),
        f"shallow blocks, Jacobi ({work.sweeps:g} sweeps a frame)": seconds(
            local * work.sweeps, shallow_read, frames * work.sweeps
        ),
    }
    if config.learnable_self_denoiser:
        times["denoiser"] = seconds(denoiser * tokens, denoiser_weights)
    else:  # weights are frozen: a backward pass takes at least the operations of a forward one, and reads as much
        times["score, forward and backward"] = 2 * forward
    return Plan({name: value / 1e9 for name, value in memory.items()}, times)


def sampling_needs(
    shape: ReleasedConfig,
    codec: WanCodec | ImageCodec,
    height: int,
    width: int,
    frames: int,
    dtype: Literal["bfloat16", "float32"],
    guided: bool = False,
    devices: int = 1,
    trained: int = 0,
) -> list[Need]:
    """What drawing a chunk of latent frames, of so many pixels, and decoding it holds at once, on each of `devices`.

    With `trained`, also what a step of training an adapter on so many clips keeps.
    """
    side = codec.space * shape.patch_size
    rows, columns = height // side, width // side
    size = f"{frames} frames of {rows} x {columns} tokens"
    work = InfoConfig(size, frames=frames, rows=rows, columns=columns, devices=devices, guided=guided, dtype=dtype)
    memory = plan(shape, work).memory
    flow = [Need(what, 1e9 * gigabytes) for what, gigabytes in memory.items()]
    if trained:
        kept = trained * shape.layers_per_block[-1] * memory["activations of a parallel pass, about"]
        flow.append(Need("activations kept for training, about", 1e9 * kept))
    return flow + codec_needs(codec, height, width, getattr(torch, dtype).itemsize, max(1, trained))


def info(config: InfoConfig) -> Plan:
    """Prints a model's parameters and its plan, and returns the plan.

    Raises:
        ValueError: if there is no such model.
    """
    model = find_config(config.model)
    frames, rows, columns = config.size(model)
    found, counts = plan(model, config), parameter_counts(model)
    total = sum(found.memory.values())
    parts = ", ".join(f"{name} {_counted(count)}" for name, count in counts.items())
    guided = "guided" if config.guided else "not guided"
    lines = [
        f"{config.model}: {_counted(sum(counts.values()))} parameters ({parts})",
        f"{config.batch} x {frames} frames of {rows} x {columns} tokens after {model.txt_size} of text, "
        f"{guided}, {config.dtype}",
        "",
        f"memory{' of each device' if config.devices > 1 else ''}, GB, without VAE and text encoder",
        *(f"  {name:<52}{value:>9.3g}" for name, value in found.memory.items()),
        f"  {'all, of ' + format(config.memory, 'g'):<52}{total:>9.3g}"
        + ("" if total <= config.memory else "  does not fit"),
        "",
        f"time, s, without both: lower bounds at {config.bandwidth:g} GB/s and {config.share:.0%} of {config.tflops:g} Tflop/s",
        *(f"  {name:<52}{value:>9.3g}" for name, value in found.seconds.items()),
    ]
    print("\n".join(lines))
    return found


def _counted(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e7 else f"{parameters / 1e6:.2f} M"
