"""What callers give a world, held against what it expects: copies of their own come back, or a clear error."""

import getpass
import hashlib
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from sfv_world.transfer import to_device, to_host

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where commands compute, if nobody says."""


def given_device(device: str | torch.device) -> torch.device:
    """A device that torch finds on this machine.

    Raises:
        ValueError: if it is another.
    """
    accelerator, counts = torch.accelerator.current_accelerator(check_available=True), {"cpu": 1}
    if accelerator is not None:
        counts[accelerator.type] = torch.accelerator.device_count()
    names = [name for kind, count in counts.items() for name in (kind, *(f"{kind}:{n}" for n in range(count)))]
    if str(device) not in names:
        raise ValueError(
            f"device: expected one that torch finds on this machine ({', '.join(names)}), got {str(device)!r}. Name one of these."
        )
    return torch.device(device)


def check_folder(name: str, folder: Path) -> None:
    """Raises a ValueError unless `folder` is one that can be written to, or can be made."""
    found = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not (found.is_dir() and os.access(found, os.W_OK)):
        problem = "cannot be written to" if found.is_dir() else "is no folder"
        raise ValueError(
            f"{name}: expected a folder that can be written to, got {folder}: {found} {problem}. Name another."
        )


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs of the same user, on the same machine, out of a folder that one writes to for long.

    Raises:
        ValueError: if another run is in it.
    """
    user = getattr(os, "getuid", getpass.getuser)()
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"sfv-world-{user}-{name}.lock"
    lock = FileLock(path, blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"out: expected a folder that no other run writes to, got {folder}, which one does. Wait for it, or name another."
        ) from None
    try:
        yield
    finally:
        with suppress(OSError):  # where open files cannot be removed, it stays
            path.unlink()
        lock.release()


def check_counts(config: Any, *names: str) -> None:
    """Raises a ValueError unless each of these numbers of a configuration is none or at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}.")


def check_number(name: str, value: Any, wanted: str, least: float) -> None:
    """Raises a ValueError unless a value is a finite number of at least `least`, which is `wanted` in words."""
    if not (isinstance(value, float | int | np.number) and least <= value < math.inf):
        raise ValueError(f"{name}: expected {wanted}, got {value!r}.")


def check_seed(seed: int) -> None:
    """Raises a ValueError unless all that draws by chance takes it."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: expected 0 to 2**32 - 1, got {seed}.")


def set_threads(count: int | None) -> None:
    """Has torch compute with so many CPU threads; none: with as many as it chose.

    Raises:
        ValueError: if it is less than one.
    """
    if count is not None:
        if count < 1:
            raise ValueError(f"threads: expected none or at least 1, got {count}.")
        torch.set_num_threads(count)


def given_frames(frames: Any, lead: str, shape: tuple[int, ...], device: torch.device) -> UInt8[Tensor, "..."]:
    """Frames as a tensor on `device`; `lead` names the dimensions before those of `shape`, as in "(B, K".

    Raises:
        ValueError: if they are of another type or shape.
    """
    expected = f"{lead}, {', '.join(map(str, shape))}) uint8"
    try:
        copy = frames.clone() if isinstance(frames, Tensor) else np.array(frames)
    except ValueError as error:
        raise ValueError(f"frames: expected {expected}, got no array ({error}).") from error
    if copy.dtype not in (torch.uint8, np.dtype(np.uint8)):
        raise ValueError(f"frames: expected {expected}, got {copy.dtype}. Give colours from 0 to 255 as uint8.")
    got, missing = tuple(copy.shape), 1 + lead.count(",") + len(shape) - copy.ndim
    if missing or 0 in got or got[-len(shape) :] != shape:
        some = ", at least one of each" if missing or 0 in got else ""
        raise ValueError(f"frames: expected {expected}{some}, got shape {got}.{_advice(got, missing, shape)}")
    return to_device(copy, device)


def _advice(got: tuple[int, ...], missing: int, shape: tuple[int, ...]) -> str:
    """How frames of the shape `got`, with so many dimensions too few, become frames of `shape`; empty if that is anyone's guess."""
    if 0 in got:
        return ""
    if got[-3:-2] == (3,) and got[-1] != 3:
        return " Put the colours last: np.moveaxis(frames, -3, -1)."
    if got[-1:] == (1,):
        return " Repeat their grey for three colours: np.repeat(frames, 3, -1)."
    if missing == 1 and got[-2:] == shape[-3:-1]:
        return " Repeat their grey for three colours: np.repeat(frames[..., None], 3, -1)."
    if missing > 0 and got[-len(shape) :] == shape:
        return f" Add what is missing in front: frames[{', '.join(missing * ['None'])}]."
    return " Resize with cv2.INTER_AREA." if not missing and got[-1] == 3 else ""


def given_seeds(seeds: Any, rows: int) -> Int[np.ndarray, "b"]:
    """An integer a row; 0, 1, 2, ... if none are given.

    Raises:
        ValueError: if they are of another number, type or range.
    """
    if rows < 1:
        raise ValueError("seeds: expected one for every row, and at least one row, got none.")
    array = np.arange(rows) if seeds is None else np.atleast_1d(to_host(seeds, "seeds"))
    if array.shape != (rows,) or array.dtype.kind not in "iu" or ((array < 0) | (array >= 2**63)).any():
        raise ValueError(f"seeds: expected {rows} integers from 0 to 2**63 - 1, one per row, got {seeds!r}.")
    return array.astype(np.int64)


def given_noise(noise: Any, shape: tuple[int, ...], device: torch.device) -> Float[Tensor, "b l c"]:
    """Noise as a tensor on `device`.

    Raises:
        ValueError: if it is of another type or shape, or not finite.
    """
    copy = noise.detach().clone() if isinstance(noise, Tensor) else np.array(noise)
    remedy = "Give what abduct or WorldOutput.noise says of this world, frame by frame."
    if copy.dtype not in (torch.float32, np.dtype(np.float32)):
        raise ValueError(f"noise: expected {shape} float32, got {copy.dtype}. {remedy}")
    if tuple(copy.shape) != shape:
        raise ValueError(f"noise: expected {shape} float32, got shape {tuple(copy.shape)}. {remedy}")
    z = to_device(copy, device)
    if not z.isfinite().all():
        raise ValueError(f"noise: expected finite numbers, got NaN or infinity. {remedy}")
    return z
