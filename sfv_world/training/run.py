"""A training run: the loop, the checkpoints it goes on from and what they hold; what is trained, a subclass says.

Everything random in a step follows from (seed, step), so a run that was killed and resumed sees the same data and the
same noise as one that was not. The folder always holds what was trained, readable (the moving average of the weights), and
the state to resume from; a loss that is not finite stops the run before either is touched. Many processes share a step
by `distributed`; what is said here of the run is then said of all of them together.
"""

import json
import math
import time
from abc import ABC, abstractmethod
from contextlib import closing, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from sfv_world.checkpoint import CODEC, CONFIG, MODEL, STARTS, check_vacant, remove_leftovers
from sfv_world.data.clips import Episodes, load_episodes
from sfv_world.data.split import as_options, common_split
from sfv_world.given import set_threads
from sfv_world.interrupt import patient
from sfv_world.training.distributed import ALONE, Group, gathered, load_state, save_state
from sfv_world.training.schedule import RunBar, RunConfig, progress, rate

STATE = "training.json"
WRITTEN = (STATE, CONFIG, MODEL, STARTS, CODEC, "reconstructions.png", "samples/*")
"""Files of runs, each of which is whole or not there: patterns."""


class Run(ABC):
    """One training run, or one process's part in it."""

    FREE: ClassVar[tuple[str, ...]] = (
        "data", "out", "resume", "steps", "minutes", "learning_rate", "validate_minutes", "device", "threads"
    )  # fmt: skip
    """What a resumed run may have otherwise than the one it continues."""
    LEFTOVERS: ClassVar[tuple[str, ...]] = ("tensorboard",)
    """What a run may have left in its folder that ended before its first checkpoint."""

    config: Any
    model: Any
    """What is trained."""
    average: AveragedModel
    """The moving average of its weights."""
    optimizers: dict[str, torch.optim.AdamW]
    """By the part of the model that each moves."""

    def __init__(self, config: RunConfig, group: Group = ALONE):
        group.share(config.batch)
        self.config, self.group = config, group
        set_threads(config.threads)
        self._check_out()
        episodes = load_episodes(config.data)
        self.config = replace(config, episodes=self._count(episodes))
        self.train, self.held_out = episodes.split(config.held_out, config.seed, self.config.episodes)
        self.later = len(episodes) - len(self.train) - len(self.held_out)
        self.step, self.elapsed = 0, 0.0

    @property
    @abstractmethod
    def frames_a_step(self) -> int:
        """Frames that a step trains on, those of all processes together."""

    @abstractmethod
    def validate(self) -> dict[str, float]:
        """Numbers on held-out episodes, by the averaged weights; the first process finds them, others nothing."""

    @abstractmethod
    def _train_step(self) -> dict[str, float]:
        """One step of all optimisers; numbers of it."""

    @abstractmethod
    def _told(self, metrics: dict[str, float]) -> str:
        """What the progress bar says of a step."""

    @abstractmethod
    def _write(self, about: dict[str, Any]) -> None:
        """Writes what was trained, and `about` with it."""

    @abstractmethod
    def _sample(self) -> None:
        """Writes a picture of what was trained."""

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the last validation's numbers."""
        config, first = self.config, self.group.first
        for name in WRITTEN if first else ():
            remove_leftovers(config.out / name)
        validation: dict[str, float] = {}
        if progress(config, self.step, self.elapsed) >= 1:
            if first:
                done = f"{self.step} steps, {self.elapsed / 60:.1f} minutes"
                print(f"nothing to do: {config.out} has {done}. Ask for more to go on.")
            return validation
        writer = SummaryWriter(str(config.out / "tensorboard"), purge_step=self.step + 1) if first else None
        size = sum(parameter.numel() for parameter in self.model.parameters())
        if first:
            later = f", {self.later} later ones left out" if self.later else ""
            print(
                f"{size / 1e6:.1f} M parameters, {len(self.train)} episodes to train on, {len(self.held_out)} held out{later}"
            )
        bar = RunBar(config, self.step, self.elapsed, disable=not first)
        last_validation = self.elapsed
        with patient() as interrupted, closing(bar.bar), closing(writer) if writer else nullcontext():
            while progress(config, self.step, self.elapsed) < 1:
                began = time.perf_counter()
                metrics = self._train_step()
                self.elapsed = self.group.agree(self.elapsed + time.perf_counter() - began)
                speed = self.frames_a_step * self.step / max(self.elapsed, 1e-9)
                bar.show(self.step, self.elapsed, f"{self._told(metrics)}, {speed:.0f} frames/s")
                if writer:
                    for name, value in metrics.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                stop = bool(self.group.agree(float(interrupted())))
                due = self.elapsed - last_validation > 60 * config.validate_minutes
                if due or stop or progress(config, self.step, self.elapsed) >= 1:
                    last_validation = self.elapsed
                    validation = self.validate()
                    if writer:
                        for name, value in validation.items():
                            writer.add_scalar(f"held_out/{name}", value, self.step)
                        numbers = ", ".join(f"{name} {value:.4f}" for name, value in validation.items())
                        bar.bar.write(f"step {self.step}, {self.elapsed / 60:.1f} min: held out {numbers}")
                    self.save(validation)
                    self._sample()
                if stop:
                    if first:
                        bar.bar.write(f"stopped after step {self.step}: {config.out} keeps it (--resume goes on)")
                    raise KeyboardInterrupt
        return validation

    def save(self, validation: dict[str, float]) -> None:
        """Writes what was trained and the state to resume from."""
        about = {
            "training": TypeAdapter(type(self.config)).dump_python(self.config, mode="json"),
            "data": self.train.metadata,
            "steps": self.step,
            "minutes": round(self.elapsed / 60, 1),
            "processes": self.group.size,
            "held_out": {name: round(value, 4) for name, value in validation.items()},
        }
        self._write(about)
        reached = {"step": self.step, "elapsed": self.elapsed, "config": self._identity(), **self._begun()}
        save_state(self.config.out / STATE, self._state(), reached, self.group)

    def _parents(self) -> dict[str, dict[str, Any]]:
        """What is said about all that a new run begins with, by the option that names it."""
        return {}

    def _count(self, episodes: Episodes) -> int:
        """How many episodes are split: those asked for, else those that the run had or its parents, else all.

        Raises:
            ValueError: if parents of a new run were trained on episodes that it would hold out.
        """
        config, there, count = self.config, len(episodes), self.config.episodes
        if config.resume:
            count = self._reached()["config"].get("episodes") if count is None else count
            return there if count is None else count
        parents = self._parents()
        theirs = common_split(parents, episodes.metadata)
        count = min(theirs.get("episodes", there), there) if count is None else count
        mine = {"seed": config.seed, "held_out": config.held_out, "episodes": count}
        if mine != mine | theirs:
            raise ValueError(
                f"{', '.join(parents)}: expected the split of this recording that was trained with there, "
                f"{as_options(theirs)}, got {as_options(mine)}: episodes known there would be held out here. Give these "
                "options, or another recording."
            )
        return count

    def _begun(self) -> dict[str, Any]:
        """What else a resumed run has to know of how the run began, JSON."""
        return {}

    def _optimize(self, parts: dict[str, list[nn.Parameter]]) -> None:
        """Gives every part its optimiser; the last thing to be made, from which a resumed run goes on."""
        self.optimizers = {
            part: torch.optim.AdamW(_decay_groups(parameters, self.config.weight_decay), betas=(0.9, 0.95), fused=True)
            for part, parameters in parts.items()
        }
        if self.config.resume:
            self._load()

    def _update(self, part: str, loss: Tensor, peak: float) -> float:
        """One step of a part's optimiser, whose learning rate peaks at `peak`; gives the norm of the gradient."""
        config, optimizer = self.config, self.optimizers[part]
        for options in optimizer.param_groups:
            options["lr"] = peak * rate(config, self.step, self.elapsed)
        optimizer.zero_grad()
        loss.backward()
        parameters = [parameter for options in optimizer.param_groups for parameter in options["params"]]
        norm = gathered(nn.utils.clip_grad_norm_(parameters, config.gradient_clip)).item()
        whole = self.group.average(loss).item()
        if not (math.isfinite(whole) and math.isfinite(norm)):
            advice = "Begin again"
            if (config.out / STATE).exists():
                advice = f"{config.out} keeps the last good checkpoint: go on from it (--resume)"
            raise FloatingPointError(
                f"step {self.step}: the {part}'s loss is {whole} and its gradient {norm}, expected finite numbers. {advice} "
                "with a lower --learning-rate."
            )
        optimizer.step()
        return norm

    def _check_out(self) -> None:
        """Raises a ValueError if the folder is not one to go on in, or not one to begin in."""
        config = self.config
        if config.resume:
            if not (config.out / STATE).exists():
                raise ValueError(
                    f"resume: expected a training run in {config.out}, found no {STATE}. Leave out --resume."
                )
            return
        if (config.out / STATE).exists():
            raise ValueError(
                f"out: {config.out} holds a training run. Add --resume to continue it, or name another folder."
            )
        check_vacant(config.out, "codec or world", CODEC, CONFIG)
        names = sorted(path.name for path in config.out.glob("*"))
        others = [name for name in names if name not in self.LEFTOVERS and not name.startswith(".")]
        if others:
            raise ValueError(
                f"out: expected a new folder, found {', '.join(others[:3])} in {config.out}. Name another."
            )

    def _identity(self, **before: Any) -> dict[str, Any]:
        """What a resumed run must share with the one it continues: its own, or that of a run that said `before` of itself.

        An option that there was not yet then is as it is here, or, of the objective, as it is by default.
        """
        config = TypeAdapter(type(self.config))
        known = config.validate_python({**config.dump_python(self.config, mode="json"), **before})
        return {name: value for name, value in config.dump_python(known, mode="json").items() if name not in self.FREE}

    def _reached(self) -> dict[str, Any]:
        """What the run that is resumed said of itself."""
        path = self.config.out / STATE
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(
                f"{path}: expected what the run said of itself, got a file that cannot be read ({error}). Begin a new run from "
                "what it trained (--init)."
            ) from error

    def _state(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name; those of this process only where they are sharded."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"average.{name}": tensor for name, tensor in self.average.module.state_dict().items()}
        for optimizer in self.optimizers.values():
            slots = cast(dict[str, Any], get_optimizer_state_dict(self.model, optimizer)["state"])
            state |= {
                f"optimizer.{name}.{slot}": value for name, values in slots.items() for slot, value in values.items()
            }
        return state

    def _load(self) -> None:
        reached, now = self._reached(), self._identity()
        before = self._identity(**reached["config"])
        if before != now:
            names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
            changed = {name: (before.get(name), now.get(name)) for name in names}
            raise ValueError(
                f"resume: expected the configuration of the run in {self.config.out}, got {changed} (then, now)."
            )
        load_state(self.config.out / STATE, self._state(), self.group)
        self.step, self.elapsed = reached["step"], reached["elapsed"]
        self.average.n_averaged.fill_(self.step)


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
