"""`sfv-world convert`: a pickled checkpoint of the released layout becomes a folder of safetensors.

Streaming: the pickle is mapped, and no more than one shard is held. The folder appears when it is complete, or not at all.
"""

import glob
import json
import math
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from sfv_world.checkpoint import save_tensors
from sfv_world.released.config import LAYOUT
from sfv_world.released.load import CONFIG, INDEX, Stored, fit, open_checkpoint

FORMAT = 1


@dataclass(frozen=True)
class ConvertConfig:
    """What to convert."""

    checkpoint: Annotated[Path, tyro.conf.Positional]
    """File of `torch.save` with a flat state dict."""
    out: Path
    """Folder to make."""
    config: str | None = None
    """A preset or a JSON file; none: config.json beside the checkpoint, or the preset whose tensors these are."""
    shard_megabytes: int = 1024
    """Size of a shard, and of the memory it takes to write one."""


def convert(config: ConvertConfig) -> Path:
    """Converts a checkpoint, prints what was written and left out, and returns the folder.

    Raises:
        ValueError: if the checkpoint cannot be read, was damaged since it was saved, wants to run code, does not fit its
            configuration or has weights that are not finite, if the folder holds something already or there is no room for it.
            Nothing is left behind then.
    """
    if config.shard_megabytes < 1:
        raise ValueError(f"shard_megabytes must be at least 1, got {config.shard_megabytes}")
    if not config.checkpoint.is_file():
        raise ValueError(f"{config.checkpoint}: expected a checkpoint, a file of `torch.save`; found no such file.")
    stored = open_checkpoint(config.checkpoint)
    shape, found = fit(stored, config.config)
    sizes = {name: math.prod(found[name]) * stored.read(name).element_size() for name in found}
    shards = list(split(sizes, config.shard_megabytes * 2**20))
    with whole_folder(config.out, sum(sizes.values())) as folder:
        check_records(config.checkpoint)
        index = write_shards(folder, stored, shards)
        total = {"total_size": sum(sizes.values())}
        (folder / INDEX).write_text(json.dumps({"metadata": total, "weight_map": index}, indent=2) + "\n")
        about = {"format": FORMAT, "layout": LAYOUT, "config": asdict(shape)}
        (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n")
    left_out = sorted(stored.shapes.keys() - found.keys())
    parameters = sum(map(math.prod, found.values()))
    print(
        f"{config.out}: {len(found)} tensors, {parameters:,} parameters, {len(shards)} shards, {sum(sizes.values()):,} bytes"
    )
    print(f"left out, since they are computed or of training only: {', '.join(left_out) or 'nothing'}")
    return config.out


def split(sizes: dict[str, int], limit: int) -> Iterator[list[str]]:
    """Names in order, in shards of at most `limit` bytes; a tensor larger than that has its own."""
    shard: list[str] = []
    held = 0
    for name, size in sizes.items():
        if shard and held + size > limit:
            yield shard
            shard, held = [], 0
        shard.append(name)
        held += size
    yield shard


def check_records(path: Path) -> None:
    """Raises a ValueError if a record of a file of `torch.save` is not what its checksum was taken of; mapping it asks for none."""
    with zipfile.ZipFile(path) as file:
        for record in file.infolist():
            if record.CRC == 0:  # saved without, as `torch.serialization.set_crc32_options` can have it
                continue
            try:
                with file.open(record) as content:
                    while content.read(2**24):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
                raise ValueError(
                    f"{path}: expected what was saved, got a file whose record {record.filename} has changed since ({error}). "
                    "Copy or download it again."
                ) from error


def write_shards(folder: Path, stored: Stored, shards: list[list[str]]) -> dict[str, str]:
    """Writes shard after shard; returns the file of every tensor.

    Raises:
        ValueError: if a weight is not finite.
    """
    index: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: stored.read(name).clone() for name in names}
        for name, tensor in tensors.items():
            if wrong := int((~tensor.isfinite()).sum()):
                raise ValueError(
                    f"{stored.path}: expected finite weights, got {wrong} of {tensor.numel()} in {name} that are not. Save the "
                    "model again, from before its training diverged."
                )
        save_tensors(folder / file, tensors, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    return index


@contextmanager
def whole_folder(path: Path, size: int) -> Iterator[Path]:
    """A folder to fill beside `path`, moved there if nothing went wrong and removed if something did.

    Those that a killed process was filling are removed first.

    Raises:
        ValueError: if there is something at `path`, or no room for `size` bytes.
    """
    path = path.absolute()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(
            f"{path}: expected a folder to make, found one that is there already. Remove it or give another."
        )
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        process = left.name.removeprefix(f".{path.name}.")
        if process.isdecimal() and not _runs_beside(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    existing = next(parent for parent in path.parents if parent.exists())
    if (free := shutil.disk_usage(existing).free) < size:
        raise ValueError(
            f"{path}: expected room for {size:,} bytes, got {free:,} free. Make room or give another folder."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _runs_beside(process: int) -> bool:
    """Whether another process of this number runs on this machine; always so where it cannot be asked."""
    if process == os.getpid():
        return False
    if os.name == "nt":  # a signal of 0 would end it
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True
