"""Networks of `diffusers` and `transformers` in their own folder layout: frozen, from safetensors, from this machine only.

Both libraries come with the extra `released` and are imported when they are used. A folder that lacks a tensor is refused: the
libraries would go on with random numbers in its place.
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

CONFIG = "config.json"


def import_extra(library: str) -> ModuleType:
    """A library of the extra `released`.

    Raises:
        ImportError: if it is not installed; the message has the command that does so.
    """
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        raise ImportError(
            f"{library}: expected it installed, found it missing. "
            'Run `pip install -e ".[released]"` in a clone of this project.'
        ) from None


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """The configuration of a network's folder; `what` is what errors call the network.

    Raises:
        ValueError: if the folder holds none that can be read, or no safetensors beside it.
    """
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: expected the folder of {what}, with {CONFIG} and safetensors; found none."
        ) from None
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{folder / CONFIG}: expected a JSON object, got a file that cannot be read ({error})."
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{folder / CONFIG}: expected a JSON object, got {type(values).__name__}.")
    if not weights(folder):
        raise ValueError(
            f"{folder}: expected safetensors beside {CONFIG}, found none. Pickled weights are not read: get the safetensors."
        )
    return values


def weights(folder: Path) -> list[Path]:
    """The files of safetensors in a folder."""
    return sorted(folder.glob("*.safetensors"))


def load_network(library: str, name: str, folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    """A network of the class `name` of `diffusers` or `transformers`, frozen, in evaluation mode.

    Raises:
        ImportError: if the library is not installed.
        ValueError: if the folder cannot be read or its tensors are not all those of its configuration.
    """
    kind = getattr(import_extra(library), name)
    read_config(folder, f"a {name}")
    quiet = {"torch_dtype": dtype, "low_cpu_mem_usage": False} if library == "diffusers" else {"dtype": dtype}
    try:
        network, found = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **quiet
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError, SafetensorError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}: expected a complete {name}, got files that cannot be read as one ({problem}). Copy them again."
        ) from error
    if wrong := sorted(map(str, [*found["missing_keys"], *found["mismatched_keys"]])):
        raise ValueError(
            f"{folder}: its tensors do not fit its {CONFIG}; {len(wrong)} missing or of another shape "
            f"({', '.join(wrong[:3])}). Copy both from the same place."
        )
    return network.requires_grad_(False).eval().to(device)
