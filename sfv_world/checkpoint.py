"""Checkpoints: a folder with `config.json` and safetensors, never a pickle.

Every file is written beside its place and moved there when complete, so a full disk or a killed process leaves what
was there before.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import gymnasium as gym
import torch
from minari.serialization import deserialize_space, serialize_space
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sfv_world.codec.latent import Autoencoder, AutoencoderConfig
from sfv_world.model import ModelConfig, WorldModel

FORMAT = 3
CONFIG, MODEL, STARTS = "config.json", "model.safetensors", "starts.safetensors"
DECODING = "decoding.json"
CODEC, CODEC_FORMAT = "codec.safetensors", 1
Config = TypeVar("Config")


@runtime_checkable
class Saved(Protocol):
    """A model, as far as it is saved."""

    @property
    def config(self) -> Any:
        """A dataclass: everything that decides its weights."""

    @property
    def action_space(self) -> gym.Space[Any]:
        """Space of the action at each frame."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its weights."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to beside `path`, moved there if nothing went wrong and removed if something did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(_beside(path.name, os.getpid()))
    try:
        beside.touch()
        mode = beside.stat().st_mode  # that of any new file here, which some libraries do not keep to
        yield beside
        beside.chmod(mode)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes what processes left that were killed while `replacing` a path, or all of a pattern; none may be at it now."""
    for found in path.parent.glob(_beside(path.name, "*")):
        if found.suffix[1:].isdigit():
            found.unlink(missing_ok=True)


def _beside(name: str, process: int | str) -> str:
    """Under which name a process writes a file."""
    return f".{name}.{process}"


def check_vacant(folder: Path, what: str, *names: str) -> None:
    """Raises a ValueError if a folder that is to be written holds `what` already: a file of one of the names."""
    found = [name for name in names if (folder / name).exists()]
    if found:
        raise ValueError(f"out: expected a folder without a {what}, found {found[0]} in {folder}. Name another.")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    with replacing(path) as beside:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, beside, dict(metadata or {}))
        except SafetensorError as error:
            raise OSError(f"{path}: could not be written ({error})") from error


def load_tensors(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file: its tensors and its metadata.

    Raises:
        ValueError: if there is no such file or it is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            # Copies lie as torch aligns its own tensors: sums over them round as they did before they were saved.
            return {name: file.get_tensor(name).clone() for name in file.keys()}, file.metadata() or {}
    except FileNotFoundError:
        raise ValueError(f"{path}: expected a safetensors file, found none.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a complete safetensors file, got one that cannot be read ({error}). "
            "It may be cut off or of another format; pickled checkpoints are never read. Copy or download it again."
        ) from error


def save_model(folder: Path, model: Saved, about: Mapping[str, Any] | None = None) -> None:
    """Writes a model's weights and configuration; `about` is kept in the configuration for people to read."""
    config = {
        "format": FORMAT,
        "kind": type(model.config).__name__,
        "model": TypeAdapter(type(model.config)).dump_python(model.config, mode="json"),
        "action_space": json.loads(serialize_space(model.action_space)),
        "about": dict(about or {}),
    }
    save_tensors(folder / MODEL, model.state_dict())
    with replacing(folder / CONFIG) as beside:
        beside.write_text(json.dumps(config, indent=2) + "\n")


def load_model(folder: Path, device: str | torch.device = "cpu") -> tuple[WorldModel, dict[str, Any]]:
    """Reads a model and what its configuration says about it.

    Raises:
        ValueError: if the folder holds no world of this format, or its weights do not fit its configuration.
    """
    config, action_space, about = read_world(folder, ModelConfig)
    tensors = fitting(folder / MODEL, lambda: WorldModel(config, action_space), device)
    model = WorldModel(config, action_space).to(device, torch.float32)  # whatever torch's default is
    model.load_state_dict(tensors)
    return model.eval(), about


def read_world(folder: Path, kind: type[Config]) -> tuple[Config, gym.Space[Any], dict[str, Any]]:
    """The model's configuration in a world's folder, the action space, and what is said about the world.

    Raises:
        ValueError: if the folder holds no world of this format and kind.
    """
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
        if isinstance(config, dict) and "layout" in config:
            raise ValueError(
                f"{folder}: expected a world, got a released model, which knows of no actions. Train a world on it with "
                "`sfv-world train --init ... --freeze-backbone`, or make films of it with `sfv-world generate`."
            )
        if isinstance(config, dict) and "codec_format" in config:
            raise ValueError(
                f"{folder}: expected a world, got a codec. Train a world of its latents with `sfv-world train --codec`."
            )
        if not isinstance(config, dict) or config.get("format") != FORMAT:
            found = config.get("format") if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"{path}: expected a world of format {FORMAT}, got {found!r}. Train or convert it again.")
        if config.get("kind", ModelConfig.__name__) != kind.__name__:
            kinds = {ModelConfig.__name__: "of its own weights", "AdaptedConfig": "on a released model"}
            wanted, got = (kinds.get(name, name) for name in (kind.__name__, config["kind"]))
            raise ValueError(f"{path}: expected a world {wanted}, got one {got}, which this does not take.")
        model_config = TypeAdapter(kind).validate_python(config["model"])
        action_space = deserialize_space(json.dumps(config["action_space"]))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: expected a world's folder, with {CONFIG} and {MODEL}; found no {CONFIG}."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path}: expected a world's configuration, got one that cannot be read ({error}).") from error
    return model_config, action_space, config.get("about", {})


def kind_of(folder: Path) -> str | None:
    """The kind of the world in a folder, by the class of its configuration; none if nothing says."""
    try:
        return json.loads((folder / CONFIG).read_text()).get("kind")
    except (OSError, ValueError, AttributeError):
        return None  # whoever reads it says what is wrong


def save_autoencoder(folder: Path, autoencoder: Autoencoder, about: Mapping[str, Any] | None = None) -> None:
    """Writes the folder of an autoencoder, which `sfv-world train --codec` takes."""
    shape = TypeAdapter(AutoencoderConfig).dump_python(autoencoder.config, mode="json")
    save_tensors(folder / CODEC, autoencoder.state_dict())
    with replacing(folder / CONFIG) as beside:
        beside.write_text(
            json.dumps({"codec_format": CODEC_FORMAT, "codec": shape, "about": dict(about or {})}, indent=2) + "\n"
        )


def load_autoencoder(folder: Path, device: str | torch.device = "cpu") -> tuple[Autoencoder, dict[str, Any]]:
    """Reads what `save_autoencoder` wrote.

    Raises:
        ValueError: if the folder holds no autoencoder of this format, or its weights do not fit its configuration.
    """
    path, remedy = folder / CONFIG, "Train one with `sfv-world train-codec`."
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict) or config.get("codec_format") != CODEC_FORMAT:
            found = list(config) if isinstance(config, dict) else type(config).__name__
            raise ValueError(f"{path}: expected a codec of 'codec_format' {CODEC_FORMAT}, got {found}. {remedy}")
        shape = TypeAdapter(AutoencoderConfig).validate_python(config["codec"])
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{folder}: expected a codec's folder, with {CONFIG} and {CODEC}; found no {CONFIG}. {remedy}"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a codec's configuration, got one that cannot be read ({error}). {remedy}"
        ) from error
    tensors = fitting(folder / CODEC, lambda: Autoencoder(shape), device)
    autoencoder = Autoencoder(shape).to(device)
    autoencoder.load_state_dict(tensors)
    return autoencoder.eval(), config.get("about", {})


def fitting(path: Path, make: Callable[[], nn.Module], device: str | torch.device) -> dict[str, Tensor]:
    """The tensors of a file, float32, if they are those of the module that `make` makes; else a ValueError."""
    tensors, _ = load_tensors(path, device)
    with torch.device("meta"):
        module = make()
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if expected != found:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        some = ", ".join(f"{name}: expected {expected.get(name)}, got {found.get(name)}" for name in wrong[:3])
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit {CONFIG} ({some}).")
    return {name: tensor.float() for name, tensor in tensors.items()}
