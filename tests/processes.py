"""Trains runs on one, two or three processes, for `test_distributed`: python tests/processes.py PLAN.json ENDS.json

PLAN lists [processes, run]. A run is the fields of a `TrainConfig`; `stop` leaves it before that step as a kill would,
`poison` makes the loss of the last process NaN at that step. ENDS gets what ended each run, by its folder's name, as every
process tells it. A run has processes of its own, as `torchrun` would start them, but forked, so that they need not import
everything again.
"""

import faulthandler
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter

from sfv_world.training import trainer
from sfv_world.training.config import PRESETS, TrainConfig
from sfv_world.training.distributed import Group, joined
from sfv_world.training.trainer import Trainer

PRESETS["tiny"] = 1


class Killed(Exception):
    """Stands for a kill."""


class Run(Trainer):
    """A training run that ends as told, with short validations and without films."""

    stop = poison = None

    def _train_step(self) -> dict[str, float]:
        if self.step == self.stop:
            raise Killed("killed")
        return super()._train_step()

    def validate(self, batches: int = 1) -> dict[str, float]:
        return super().validate(batches)

    def _sample(self) -> None:
        pass


def train(options: dict[str, Any], group: Group) -> str:
    """Trains and tells what ended it."""
    stop, poison = options.get("stop"), options.get("poison")
    fields = {name: value for name, value in options.items() if name not in ("stop", "poison")}
    real_loss = trainer.world_loss

    def poisoned(*arguments: Any) -> Any:
        loss = real_loss(*arguments)
        last = run.step == poison and group.rank == group.size - 1
        return loss._replace(value=loss.value * float("nan")) if last else loss

    trainer.world_loss = poisoned
    try:
        run = Run(TypeAdapter(TrainConfig).validate_python(fields), group)
        run.stop = stop
        run.run()
        return "done"
    except (Killed, ValueError, FloatingPointError) as error:
        return str(error)


def process(rank: int, size: int, port: int, run: dict[str, Any], files: list[Path]) -> None:
    """One process of `size`; it says where it was if it crashes."""
    faulthandler.enable()
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    with joined("cpu") as group:
        files[rank].write_text(train(run, group))


def main(plan: Path, ends: Path) -> None:
    """Trains everything, one run after the other."""
    found: dict[str, list[str]] = {}
    for size, run in json.loads(plan.read_text()):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        files = [ends.with_suffix(f".{rank}") for rank in range(size)]
        context = torch.multiprocessing.start_processes(
            process, (size, port, run, files), size, join=False, start_method="fork"
        )
        while not context.join():
            pass
        found[Path(run["out"]).name] = [file.read_text() for file in files]
    ends.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
