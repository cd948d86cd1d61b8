"""Worlds in folders: loads them with what came with them, and keeps the frames to start them from."""

from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter, ValidationError

from sfv_world.checkpoint import CONFIG, DECODING, STARTS, load_model, load_tensors, save_tensors
from sfv_world.control.spaces import action_size, flatten_actions
from sfv_world.data.clips import ClipSampler, Episodes
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.given import given_device
from sfv_world.model import WorldModel
from sfv_world.released.adapted import AdaptedModel, is_adapted, load_adapted
from sfv_world.world import World

SHIPPED = Path(__file__).parent / "checkpoints"


def find_world(name: str | Path) -> Path:
    """Folder of a world: a shipped one's name, unless there is a world in a folder of that name, or a folder.

    Raises:
        ValueError: if there is none.
    """
    shipped = {path.parent.name: path.parent for path in SHIPPED.glob(f"*/{CONFIG}")}
    folder = Path(name) if isinstance(name, str | Path) and str(name) else None
    if folder is not None and (folder / CONFIG).is_file():
        return folder
    if str(name) in shipped:
        return shipped[str(name)]
    if folder is None or not folder.is_dir():
        raise ValueError(f"world: expected a folder or one of {sorted(shipped)}, got {str(name)!r}.")
    return folder


def load_world(
    name: str | Path,
    device: str | torch.device = "cpu",
    decoding: DecodingConfig | None = None,
    dtype: torch.dtype | None = None,
) -> World:
    """Loads a world: the name of a shipped one, or a folder.

    Args:
        name: of the world.
        device: where to compute it.
        decoding: how; none: as it was calibrated for this kind of device, or the defaults of its kind.
        dtype: what the Transformers' layers compute in, float32 or bfloat16; none: float32 or, on CUDA, the backbone of a world on
            a released model in bfloat16. All else stays in float32: noise, means and scales, log-likelihoods, which are those of
            the frames returned under the model so computed.

    Raises:
        ValueError: if there is none, its files are damaged or do not fit each other, the dtype is another, or there is no such
            device.
    """
    folder = find_world(name)
    if not isinstance(decoding, DecodingConfig | None):
        raise ValueError(
            f"decoding: expected a DecodingConfig or None, got {type(decoding).__name__}. Give fields to `with_decoding`."
        )
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}.")
    device = given_device(device)
    model: WorldModel | AdaptedModel
    if is_adapted(folder):
        model, about = load_adapted(folder, device, dtype)
    else:
        model, about = load_model(folder, device)
        model.compute_in(dtype or torch.float32)
    world = World(model, decoding or calibrated(folder, device), None, about, folder.resolve())
    if (folder / STARTS).exists():
        world.starts, _ = load_tensors(folder / STARTS)
        expected = {"frames": world.frame_shape, "actions": (action_size(world.action_space),)}
        found = {name: tuple(tensor.shape) for name, tensor in world.starts.items()}
        if {name: shape[2:] for name, shape in found.items()} != expected or len({s[:2] for s in found.values()}) > 1:
            raise ValueError(f"{folder / STARTS}: expected (count, K) each of {expected}, got {found}. Train it again.")
    return world


def calibrated(folder: Path, device: str | torch.device) -> DecodingConfig | None:
    """How `sfv-world calibrate` found the world in `folder` to decode fastest on this kind of device; none if it was not run."""
    path = folder / DECODING
    if not path.exists():
        return None
    try:
        return TypeAdapter(dict[str, DecodingConfig]).validate_json(path.read_bytes()).get(torch.device(device).type)
    except ValidationError as error:
        raise ValueError(
            f"{path}: expected decoding options by device ({error}). Delete it, and run `sfv-world calibrate`."
        ) from error


def save_starts(folder: Path, episodes: Episodes, count: int = 32, frames: int = 4) -> None:
    """Keeps the first frames of some episodes, and the actions between them, to start a world from."""
    chosen = np.flatnonzero(episodes.lengths > frames)[:count]
    if len(chosen) == 0:
        raise ValueError(f"episodes: expected at least one of more than {frames} frames to start from, got none.")
    clips = ClipSampler(episodes, frames, count).clips(episodes.starts[chosen])
    actions = flatten_actions(episodes.action_space, clips.actions, (len(chosen), frames - 1))
    vectors = np.concatenate([np.zeros_like(actions[:, :1]), actions], axis=1)
    tensors = {"frames": torch.from_numpy(clips.frames), "actions": torch.from_numpy(vectors)}
    save_tensors(folder / STARTS, tensors)
