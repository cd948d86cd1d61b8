"""The training loop: a recording in, a world's folder out.

Everything random in a step follows from (seed, step), so a run that was killed and resumed sees the same clips and the
same noise as one that was not. The folder always holds a readable world (the moving average of the weights) and
the state to resume from; a loss that is not finite stops the run before either is touched. Many processes share a step
by `distributed`; what is said here of the run is then said of all of them together.
"""

import json
import math
import time
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from sfv_world.checkpoint import CODEC, CONFIG, MODEL, STARTS, check_vacant, load_autoencoder, save_model
from sfv_world.codec.latent import LatentCodec
from sfv_world.data.clips import ClipSampler, Episodes, load_episodes
from sfv_world.film import compare
from sfv_world.given import set_threads
from sfv_world.interrupt import patient
from sfv_world.loading import save_starts
from sfv_world.model import WorldModel, model_config
from sfv_world.released.adapted import AdaptedModel
from sfv_world.training.adapt import adapt
from sfv_world.training.config import PRESETS, TrainConfig
from sfv_world.training.distributed import ALONE, Group, gathered, joined, load_state, save_state
from sfv_world.training.inherit import inherit
from sfv_world.training.objective import Batch, ObjectiveConfig, noise_left, score_loss, world_loss
from sfv_world.training.schedule import RunBar, moving_average, progress, rate
from sfv_world.world import World

STATE = "training.json"


LEFTOVERS = ("tensorboard", "samples", STARTS, MODEL)
"""What a run may have left that ended before its first checkpoint."""


class Trainer:
    """One training run, or one process's part in it."""

    def __init__(self, config: TrainConfig, group: Group = ALONE):
        group.share(config.batch)
        self.config, self.group = config, group
        set_threads(config.threads)
        if config.resume != (config.out / STATE).exists():
            if config.resume:
                raise ValueError(
                    f"resume: expected a training run in {config.out}, found no {STATE}. Leave out --resume."
                )
            raise ValueError(
                f"out: {config.out} holds a training run. Add --resume to continue it, or name another folder."
            )
        if not config.resume:
            check_vacant(config.out, "codec or world", CODEC, CONFIG)
            names = sorted(path.name for path in config.out.glob("*"))
            others = [name for name in names if name not in LEFTOVERS and not name.startswith(".")]
            if others:
                raise ValueError(
                    f"out: expected a new folder, found {', '.join(others[:3])} in {config.out}. Name another."
                )
        episodes = load_episodes(config.data)
        count = config.episodes
        if count is None and config.resume:
            count = self._progress()["config"].get("episodes")
        self.config = config = replace(config, episodes=len(episodes) if count is None else count)
        self.train, self.held_out = episodes.split(config.held_out, config.seed, config.episodes)
        self.later = len(episodes) - len(self.train) - len(self.held_out)
        self.before: dict[str, int | float] | None = None
        self.model: Any = self._on_released(episodes) if config.freeze_backbone else self._of_own_weights(episodes)
        if (longest := self.held_out.lengths.max()) <= self._context:
            raise ValueError(
                f"data: expected a held-out episode of more than {self._context} frames to start worlds from, got at most "
                f"{longest} in {config.data}. Record longer ones."
            )
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(config.ema))
        denoiser = self.model.denoiser
        if group.size > 1 and config.parallel == "fully-shard":
            group.shard(self.model)
            group.shard(self.average.module)
        if denoiser is not None:  # called on its own, after the rest
            denoiser.requires_grad_(False)
        self.replica = group.replica(self.model)
        parts = {"flow": [parameter for parameter in self.model.parameters() if parameter.requires_grad]}
        if denoiser is not None:
            denoiser.requires_grad_(True)
            self.denoiser_replica = group.replica(denoiser)
            parts["denoiser"] = list(denoiser.parameters())
        self.optimizers = {
            part: torch.optim.AdamW(_decay_groups(parameters, config.weight_decay), betas=(0.9, 0.95), fused=True)
            for part, parameters in parts.items()
        }
        self.step, self.elapsed = 0, 0.0
        config = self.config
        self.sampler = ClipSampler(self.train, config.clip, config.batch, config.seed, config.busy)
        if config.resume:
            self._load()

    def _on_released(self, episodes: Episodes) -> AdaptedModel:
        """A control adapter on a released model."""
        config = self.config
        assert config.init is not None, "TrainConfig has seen to it"
        torch.manual_seed(config.seed)
        model = adapt(
            config.init, config.out, episodes, prompt=config.prompt, noise=config.noise, clip=config.clip,
            device=config.device,
        )  # fmt: skip
        clip = 1 + (config.clip - 1) // model.codec.time * model.codec.time
        self.config = replace(config, noise=model.config.noise, clip=clip)
        return model

    def _of_own_weights(self, episodes: Episodes) -> WorldModel:
        """A model that is all to be trained."""
        config = self.config
        height, width = episodes.frames.shape[1:3]
        autoencoder = load_autoencoder(config.codec)[0] if config.codec else None
        if autoencoder and (found := (autoencoder.config.height, autoencoder.config.width)) != (height, width):
            raise ValueError(
                f"codec: expected one of frames of {height} x {width} as {config.data} has, got one of {found[0]} x {found[1]} in "
                f"{config.codec}. Train one on this recording with `sfv-world train-codec`."
            )
        patch = config.patch if config.patch is not None else 2 if autoencoder else 8
        noise = config.noise if config.noise is not None else autoencoder.config.noise if autoencoder else 0.05
        self.config = config = replace(config, patch=patch, noise=noise)
        torch.manual_seed(config.seed)
        shape = model_config(
            PRESETS[config.preset],
            height,
            width,
            patch=patch,
            kind=config.kind,
            bands=config.bands,
            groups=config.groups,
            bins=config.bins,
            window=config.window,
            noise=noise,
            denoiser=config.denoiser,
            autoencoder=autoencoder.config if autoencoder else None,
        )
        model = WorldModel(shape, episodes.action_space).to(config.device)
        if autoencoder:
            cast(LatentCodec, model.codec).autoencoder.load_state_dict(autoencoder.state_dict())
        some = np.random.default_rng(config.seed).integers(len(self.train.frames), size=1000)
        model.codec.fit(torch.from_numpy(self.train.frames[some]).to(config.device), shape.noise)
        if config.init and not config.resume:
            self.before = inherit(model, config.init, config.codec, config.device)
        return model

    @property
    def averaged(self) -> Any:
        """The model with the moving average of the weights: the world that is saved. Whole on the first process only."""
        return self.group.whole(self.average.module)

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the last validation's numbers."""
        config, first = self.config, self.group.first
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
        with (
            patient() as interrupted,
            closing(bar.bar),
            closing(writer) if writer else nullcontext(),
        ):
            while progress(config, self.step, self.elapsed) < 1:
                began = time.perf_counter()
                metrics = self._train_step()
                self.elapsed = self.group.agree(self.elapsed + time.perf_counter() - began)
                bits = metrics["nats_per_dim"] / math.log(2)
                speed = config.batch * config.clip * self.step / max(self.elapsed, 1e-9)
                bar.show(self.step, self.elapsed, f"{bits:.3f} bits/dim, {speed:.0f} frames/s")
                if writer:
                    for name, value in metrics.items():
                        writer.add_scalar(f"train/{name}", value, self.step)
                stop = bool(self.group.agree(float(interrupted())))
                if (
                    self.elapsed - last_validation > 60 * config.validate_minutes
                    or progress(config, self.step, self.elapsed) >= 1
                    or stop
                ):
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

    def validate(self, batches: int = 4) -> dict[str, float]:
        """Means over fixed clips of held-out episodes, by the averaged weights; the first process finds them, others nothing."""
        model, config = self.averaged, self.config
        if not self.group.first:
            return {}
        sampler = ClipSampler(self.held_out, config.clip, 16, seed=1)
        generator = torch.Generator(config.device).manual_seed(config.seed)
        objective, found = ObjectiveConfig(action_dropout=0.0), []
        model.eval()
        with torch.no_grad():
            for index in range(batches):
                batch = Batch.from_clips(sampler.batch(index), model)
                loss = world_loss(model, batch, objective, generator)
                left = {"noise_left": noise_left(model, batch, loss)} if model.denoiser else {}
                found.append(loss.metrics | left)
        return {name: float(np.mean([metrics[name].item() for metrics in found])) for name in found[0]}

    def save(self, validation: dict[str, float]) -> None:
        """Writes the world, its start frames and the state to resume from."""
        config = self.config
        about = {
            "training": TypeAdapter(TrainConfig).dump_python(config, mode="json"),
            "data": self.train.metadata,
            "steps": self.step,
            "minutes": round(self.elapsed / 60, 1),
            "processes": self.group.size,
            "before": self.before,
            "held_out": {name: round(value, 4) for name, value in validation.items()},
        }
        model = self.averaged
        if self.group.first:
            save_starts(config.out, self.held_out, frames=self._context)
            save_model(config.out, model, about)
        progress = {
            "step": self.step,
            "elapsed": self.elapsed,
            "config": self._identity(),
            "init": about["training"]["init"],
            "before": self.before,
        }
        save_state(config.out / STATE, self._state(), progress, self.group)

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

    def _train_step(self) -> dict[str, float]:
        config, group = self.config, self.group
        peaks = {"flow": config.learning_rate, "denoiser": config.denoiser_learning_rate}
        for part, optimizer in self.optimizers.items():
            for options in optimizer.param_groups:
                options["lr"] = peaks[part] * rate(config, self.step, self.elapsed)
        generator = torch.Generator(config.device).manual_seed(config.seed * 1_000_003 + self.step)
        batch = Batch.from_clips(self.sampler.batch(self.step, group.share(config.batch)), self.model)
        plain = "denoiser" in self.optimizers and self.step % config.objective.score_every == 0
        autocast = torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.device.startswith("cuda"))
        with autocast:
            loss = world_loss(self.model, batch, config.objective, generator, plain, group, self.replica)
        metrics, norm = dict(loss.metrics), self._update("flow", loss.value)
        if plain:
            with autocast:
                error = score_loss(self.model, loss, generator, group, self.denoiser_replica)
            self._update("denoiser", error)
            metrics["score_loss"] = error.detach()
        self.average.update_parameters(self.model)
        self.step += 1
        means = group.average(torch.stack(list(metrics.values()))).tolist()
        values = dict(zip(metrics, means, strict=True))
        return {**values, "gradient_norm": norm, "learning_rate": self.optimizers["flow"].param_groups[0]["lr"]}

    def _update(self, part: str, loss: Tensor) -> float:
        """One step of a part's optimiser; gives the norm of the gradient."""
        config, optimizer = self.config, self.optimizers[part]
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

    def _identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one it continues."""
        config = TypeAdapter(TrainConfig).dump_python(self.config, mode="json")
        free = (
            "out",
            "resume",
            "steps",
            "minutes",
            "validate_minutes",
            "device",
            "threads",
            "parallel",
            "learning_rate",
            "denoiser_learning_rate",
            "data",
            "init",
            "freeze_backbone",
            "prompt",
        )
        return {name: value for name, value in config.items() if name not in free}

    def _progress(self) -> dict[str, Any]:
        """What the run that is resumed said of itself."""
        return json.loads((self.config.out / STATE).read_text())

    def _load(self) -> None:
        progress, now = self._progress(), self._identity()
        before = {"episodes": now["episodes"], **progress["config"]}  # runs begun earlier do not say
        if before != now:
            changed = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
            raise ValueError(
                f"resume: expected the configuration of the run in {self.config.out}, got {changed} (then, now)."
            )
        load_state(self.config.out / STATE, self._state(), self.group)
        self.step, self.elapsed, self.before = progress["step"], progress["elapsed"], progress["before"]
        self.config = replace(self.config, init=progress["init"] and Path(progress["init"]))
        self.average.n_averaged.fill_(self.step)

    def _sample(self) -> None:
        """Writes a film of an imagined held-out episode above the real one."""
        model, film = self.averaged, self.config.out / "samples" / f"{self.step:06d}.mp4"
        if self.group.first:
            rows = 1 if self.config.freeze_backbone else 4
            compare(World(model), self.held_out, film, rows=rows, frames=24, context=self._context)

    @property
    def _context(self) -> int:
        """Frames to begin with: four, or the whole steps that have them."""
        return self.model.codec.whole(4)


def train(config: TrainConfig) -> dict[str, float]:
    """Trains a world (see `TrainConfig`) and returns the last validation's numbers.

    Started by `torchrun`, it is one of the processes that train it together.
    """
    with joined(config.device) as group:
        return Trainer(replace(config, device=group.device), group).run()


def _decay_groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices only."""
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
