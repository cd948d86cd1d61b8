"""Training on many processes: what each takes of a batch, how they agree, and the state they write together.

`torchrun` starts the processes. Each draws the clips and the noise of the whole batch, takes its rows of them, and finds its
part of the loss, scaled so that the mean over the processes is the loss of the whole batch. So the mean of their gradients,
which both DistributedDataParallel and fully_shard take, is the gradient that one process would find. One process is the
group `ALONE`, for which all of this is the identity.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from sfv_world.checkpoint import replacing
from sfv_world.denoiser import Denoiser
from sfv_world.given import given_device
from sfv_world.layers import Layer
from sfv_world.model import WorldModel

Parallel = Literal["ddp", "fully-shard"]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    """Number of this process; the first, 0, is the one that prints, validates and writes worlds."""
    size: int = 1
    """Processes."""
    device: str = "cpu"
    """Where this process trains."""

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """The rows of a batch that this process takes.

        Raises:
            ValueError: if the batch cannot be shared equally.
        """
        if batch % self.size:
            raise ValueError(
                f"batch: expected a multiple of the {self.size} processes, got {batch} clips. "
                "--batch counts the clips of all processes together; change it or --nproc-per-node."
            )
        each = batch // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def own(self, batch: Tensor) -> Tensor:
        """This process's rows of a tensor that all of them have."""
        return batch[self.share(len(batch))]

    def average(self, x: Tensor) -> Tensor:
        """The mean of `x` over all processes, without gradient."""
        if self.size == 1:
            return x.detach()
        total = x.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def mean(self, values: Tensor, weights: Tensor) -> Tensor:
        """This process's part of a weighted mean over the whole batch: the mean over the processes is that mean."""
        return (values * weights).sum() / self.average(weights.sum()).clamp(min=1e-9)

    def agree(self, value: float) -> float:
        """The first process's value."""
        if self.size == 1:
            return value
        told = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(told, src=0)
        return told.item()

    def replica(self, model: nn.Module) -> nn.Module:
        """What to call in a model's place, so that the gradients of `backward` are means over all processes."""
        if self.size == 1 or isinstance(model, FSDPModule):
            return model
        devices = [torch.device(self.device)] if self.device.startswith("cuda") else None
        return DistributedDataParallel(model, device_ids=devices)

    def shard(self, model: nn.Module) -> None:
        """Cuts the weights of a model in place, one shard for each process; every layer is whole only while it is used."""
        mesh = init_device_mesh(torch.device(self.device).type, (self.size,))
        for module in model.modules():
            if isinstance(module, Layer):
                fully_shard(module, mesh=mesh)
        for module in model.modules():
            if isinstance(module, Denoiser):  # called on its own
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    def whole(self, model: nn.Module) -> nn.Module:
        """A model with all its weights, on the first process; every process must ask, and the others get theirs back."""
        if not isinstance(model, FSDPModule):
            return model
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not self.first:
            return model
        assert isinstance(model, WorldModel), "others are not sharded"
        whole = WorldModel(model.config, model.action_space)
        whole.load_state_dict(weights)
        return whole.to(self.device).eval()


ALONE = Group()
"""One process."""


def gathered(x: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over processes; every process must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


@contextmanager
def joined(device: str) -> Iterator[Group]:
    """The group of the processes that `torchrun` started with this one; without it, this one alone.

    They speak by NCCL if `device` is CUDA, each on the device of its local rank, and by gloo otherwise.

    Raises:
        ValueError: if there is no such device.
    """
    device, size = str(given_device(device)), int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield Group(device=device)
        return
    cuda = device.startswith("cuda")
    if cuda:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=torch.device(device) if cuda else None)
    try:
        with warnings.catch_warnings():
            # True, and no trouble: nothing changes what a model returned in place.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield Group(dist.get_rank(), size, device)
    finally:
        dist.destroy_process_group()


def save_state(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], group: Group) -> None:
    """Writes the state of a run: `path`, JSON of `about`, and beside it a folder of safetensors, a file from each process.

    A folder is written under a name that the JSON does not have yet, and removed only when it has another, so there is always one
    whole state. Every process must call.

    Raises:
        OSError: if a process cannot write.
    """
    before = json.loads(path.read_text())["shards"] if path.exists() else None
    names = [f"{path.stem}.{name}" for name in ("a", "b")]
    name = names[names[0] == before]
    if group.first:
        shutil.rmtree(path.parent / name, ignore_errors=True)  # of a run that was killed while it wrote
    writer = dcp.HuggingFaceStorageWriter(str(path.parent / name), save_distributed=True)
    try:
        with _quiet():
            dcp.save(dict(tensors), storage_writer=writer, no_dist=group.size == 1)
    except CheckpointException as error:  # on all processes: none writes any more
        if group.first:
            shutil.rmtree(path.parent / name, ignore_errors=True)
        raise OSError(f"{path.parent / name}: expected to write the state of the run, got {_cause(error)}.") from error
    if group.first:
        with replacing(path) as beside:
            beside.write_text(json.dumps({**about, "shards": name}, indent=2) + "\n")
        if before:
            shutil.rmtree(path.parent / before)


def load_state(path: Path, tensors: Mapping[str, Tensor], group: Group) -> None:
    """Reads what any number of processes wrote with `save_state` into `tensors`; every process must call.

    Raises:
        ValueError: if the files are not whole or hold other tensors.
    """
    folder = path.parent / json.loads(path.read_text())["shards"]
    try:
        with _quiet():
            reader = dcp.HuggingFaceStorageReader(str(folder))
            dcp.load(dict(tensors), storage_reader=reader, no_dist=group.size == 1)
    except (CheckpointException, SafetensorError, OSError) as error:
        raise ValueError(
            f"{folder}: expected the state of a run, got files that cannot be read ({_cause(error)}). Train anew in another folder."
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process is only one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _cause(error: BaseException) -> BaseException:
    """What went wrong on the first process that failed."""
    failures = cast(dict[int, Any], getattr(error, "failures", {}))
    return next((failure[0] for failure in failures.values()), error)
