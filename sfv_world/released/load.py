"""Reading checkpoints of the released layout: one pickled state dict, or the safetensors that `convert` makes of it.

Files are mapped, not read: a tensor takes memory when it is used, and code in a pickle is never run. Shapes are held against
the configuration before any tensor is read.
"""

import json
import pickle
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from sfv_world.pretrained import weights
from sfv_world.released.config import PRESETS, ReleasedConfig, find_config
from sfv_world.released.model import ReleasedFlow

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
LEFT_OUT = re.compile(r"var|(.+\.)?attn_mask|(.+\.)?feat_rope\.freqs_\w+")  # of training, or computed
# What `torch.load` and its restricted unpickler raise of files that are cut off or were tampered with.
DAMAGED = (
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    AttributeError,
    TypeError,
    ValueError,
    AssertionError,
    struct.error,
)
SMALL, SAMPLED = 2**16, 64
"""Numbers below which all of a tensor are part of its checksum, and about how many of a larger one."""
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """Tensors of a checkpoint that are known by name and shape, and read one by one."""

    path: Path
    shapes: Shapes
    read: Callable[[str], Tensor]


def open_checkpoint(path: Path) -> Stored:
    """A checkpoint's tensors: `path` is a file of `torch.save` or a converted folder.

    Raises:
        ValueError: if it is neither, is damaged, or holds anything but tensors.
    """
    return _open_folder(path) if path.is_dir() else _open_pickle(path)


def _open_pickle(path: Path) -> Stored:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a checkpoint, found no such file.") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class|type|function) ([\w.]+)", str(error))
        what = found.group(1) if found else str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a state dict of tensors alone, got a pickle that asks for more ({what}). It was not run. "
            "Save it again with `torch.save(model.state_dict(), path)` where you trust its source."
        ) from error
    except DAMAGED as error:
        problem = str(error).partition("\n")[0]
        raise ValueError(
            f"{path}: expected a state dict in the zip format of `torch.save`, got a file that cannot be read as one ({problem}). "
            "It may be cut off or of the old format: copy it, or save it, again."
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a flat state dict (name -> tensor), got {type(state).__name__}.")
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if isinstance(name, str) and LEFT_OUT.fullmatch(name):  # whatever it is
            tensors |= {name: value} if isinstance(value, Tensor) else {}
            continue
        plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
        if not isinstance(name, str) or not plain or not value.is_floating_point():
            kind = f"a tensor of {value.dtype}" if plain else type(value).__name__
            raise ValueError(
                f"{path}: expected a flat state dict (name -> floating point tensor), got {kind} as {name!r}. "
                "If the weights are one entry of several, save that entry alone."
            )
        tensors[name] = value
    return Stored(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def _open_folder(folder: Path) -> Stored:
    try:
        index = json.loads((folder / INDEX).read_text())["weight_map"]
        paths = {name: folder / Path(name).name for name in sorted(set(index.values()))}
        if missing := [path for path in paths.values() if not path.is_file()]:
            raise FileNotFoundError(None, None, missing[0])
        files = {name: safe_open(path, framework="pt") for name, path in paths.items()}
        return _stored(folder, {name: files[file] for name, file in index.items()})
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder}: expected a converted checkpoint, with {CONFIG}, {INDEX} and its shards; found no "
            f"{Path(error.filename or INDEX).name}. Make one with `sfv-world convert`."
        ) from None
    except (
        SafetensorError,
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        raise ValueError(
            f"{folder}: expected {INDEX} and complete shards, got files that cannot be read ({error}). Copy or convert it again."
        ) from error


def open_network(folder: Path) -> Stored:
    """The tensors of a network in the layouts of `diffusers` and `transformers`.

    Raises:
        ValueError: if a file cannot be read.
    """
    of_tensor: dict[str, Any] = {}
    for path in weights(folder):
        try:
            file = safe_open(path, framework="pt")
            of_tensor |= dict.fromkeys(file.keys(), file)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: expected safetensors, got a file that cannot be read ({error}). Copy it again."
            ) from error
    return _stored(folder, of_tensor)


def _stored(folder: Path, of_tensor: dict[str, Any]) -> Stored:
    """The tensors of a folder, by the open file that each is in."""
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in of_tensor.items()}
    return Stored(folder, shapes, lambda name: of_tensor[name].get_tensor(name))


def checksum(stored: Stored, start: int = 0) -> int:
    """A checksum that goes on from `start`: of names, shapes and numbers of all tensors, however they are packed into files.

    Of large tensors numbers at even distances are read alone: files are mapped, so little of them is.
    """
    found = start
    for name, shape in sorted(stored.shapes.items()):
        values = stored.read(name).flatten()
        if len(values) >= SMALL:  # an odd step, so that they are not all of one column
            values = values[:: len(values) // SAMPLED | 1].contiguous()
        found = zlib.crc32(f"{name} {shape}".encode(), found)
        found = zlib.crc32(values.view(torch.uint8).numpy().tobytes(), found)
    return found


def expected_shapes(config: ReleasedConfig) -> Shapes:
    """Names and shapes of a model's tensors, without any memory."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in ReleasedFlow(config).state_dict().items()}


def fit(stored: Stored, config: ReleasedConfig | str | Path | None = None) -> tuple[ReleasedConfig, Shapes]:
    """The configuration that stored tensors have, and the tensors that belong to the model.

    Args:
        stored: the checkpoint.
        config: a configuration, a preset's name or a JSON file; none: `config.json` beside the tensors, or else the preset
            whose tensors are these. Tensors do not tell `pt_seq_len`, `head_dim` and the denoiser's frames.

    Raises:
        ValueError: if the tensors are not those of the configuration; it names those that are missing, unknown or of another shape.
    """
    found = {name: shape for name, shape in stored.shapes.items() if not LEFT_OUT.fullmatch(name)}
    beside = (stored.path if stored.path.is_dir() else stored.path.parent) / CONFIG
    if config is None and beside.exists():
        config = beside
    if config is None:
        fitting = [preset() for preset in PRESETS.values() if expected_shapes(preset()) == found]
        if not fitting:
            raise ValueError(
                f"{stored.path}: its {len(found)} tensors are those of no preset ({', '.join(PRESETS)}), and there is no {CONFIG} "
                "beside it. Give the model's configuration, a JSON file (--config)."
            )
        return fitting[0], found
    shape = config if isinstance(config, ReleasedConfig) else find_config(config)
    expected = expected_shapes(shape)
    other = [name for name in expected if name in found and expected[name] != found[name]]
    problems = [
        _some("missing", [name for name in expected if name not in found]),
        _some("unknown", [name for name in found if name not in expected]),
        _some("of another shape", [f"{name}: expected {expected[name]}, got {found[name]}" for name in other]),
    ]
    if any(problems):
        called = "the configuration given" if isinstance(config, ReleasedConfig) else f"configuration {config}"
        raise ValueError(
            f"{stored.path}: its tensors do not fit {called}; {'; '.join(filter(None, problems))}. Give the configuration "
            f"that the model was trained with: a JSON file or one of {', '.join(PRESETS)} (--config)."
        )
    return shape, found


def _some(problem: str, names: list[str]) -> str:
    more = ", ..." if len(names) > 6 else ""
    return f"{len(names)} {problem} ({', '.join(names[:6])}{more})" if names else ""


def kept_in(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model whose layers compute in `dtype`: the rest has at least float32."""
    return dtype if ".attn_blocks." in name else torch.promote_types(dtype, torch.float32)


def load_released(
    path: str | Path,
    config: ReleasedConfig | str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    spread: bool = False,
) -> ReleasedFlow:
    """A model from a released checkpoint or a converted folder, in evaluation mode; tensor by tensor, never held twice.

    Args:
        path: file of `torch.save` with a flat state dict, or a folder made by `sfv-world convert`.
        config: a configuration, a preset's name or a JSON file. None: the `config.json` beside the tensors, or else the
            preset whose tensors are these.
        device: where to put it.
        dtype: what the layers compute in; projections, norms and affine algebra stay in float32.
        spread: whether the processes of torch's default group share the deep block, which all of them must then run alike: each
            keeps a shard of its layers (`fully_shard`), and a layer is whole only while it is used.

    Raises:
        ValueError: if the file cannot be read, wants to run code, or its tensors do not fit the configuration.

    Example:
        >>> flow = load_released("starflow-v.pth", "starflow-v-7b", "cuda", torch.bfloat16)  # doctest: +SKIP
    """
    stored = open_checkpoint(Path(path))
    shape, found = fit(stored, config)
    with torch.device("meta"):
        flow = ReleasedFlow(shape)
    device = torch.device(device)
    if spread:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in flow.block(-1).attn_blocks:
            # Each is a root of its own, and a root would stay whole after its first pass.
            fully_shard(layer.to(dtype), mesh=mesh, reshard_after_forward=True)
    places = dict(flow.named_parameters())
    tensors = {name: _share(whole, places[name]) for name, whole in _converted(stored, found, device, dtype)}
    flow.load_state_dict(tensors, assign=True)
    return flow.eval()


def _converted(
    stored: Stored, names: Iterable[str], device: torch.device, dtype: torch.dtype
) -> Iterable[tuple[str, Tensor]]:
    for name in names:
        yield name, stored.read(name).to(device, kept_in(name, dtype))


def _share(whole: Tensor, place: Tensor) -> Tensor:
    """What this process keeps of a parameter, which has the same place in all of them."""
    if not isinstance(place, DTensor):
        return whole
    return distribute_tensor(whole, place.device_mesh, place.placements, src_data_rank=None)
