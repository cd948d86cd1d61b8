"""Training of worlds: a recording in, a world's folder out. The loop is `run`'s; the loss `objective`'s."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel

from sfv_world.checkpoint import MODEL, STARTS, load_autoencoder, read_world, save_model
from sfv_world.codec.latent import LatentCodec
from sfv_world.data.clips import ClipSampler
from sfv_world.film import compare
from sfv_world.given import alone_in
from sfv_world.loading import find_world, save_starts
from sfv_world.model import ModelConfig, WorldModel, model_config
from sfv_world.released.adapted import AdaptedConfig, AdaptedModel, is_adapted
from sfv_world.training.adapt import adapt
from sfv_world.training.config import PRESETS, TrainConfig
from sfv_world.training.distributed import ALONE, Group, joined
from sfv_world.training.inherit import inherit, inherit_adapter
from sfv_world.training.objective import Batch, noise_left, score_loss, world_loss
from sfv_world.training.run import Run
from sfv_world.training.schedule import moving_average
from sfv_world.world import World


class Trainer(Run):
    """One training run of a world, or one process's part in it."""

    FREE = (*Run.FREE, "denoiser_learning_rate", "parallel", "init", "freeze_backbone", "prompt")
    LEFTOVERS = (*Run.LEFTOVERS, "samples", STARTS, MODEL)

    config: TrainConfig

    def __init__(self, config: TrainConfig, group: Group = ALONE):
        if config.resume and is_adapted(config.out) and not config.freeze_backbone:
            raise ValueError(
                f"resume: expected --freeze-backbone and --init for the run in {config.out}, which trains a world on a released "
                "model, got none. Add them."
            )
        super().__init__(config, group)
        self.before: dict[str, int | float] | None = None
        self.model = self._on_released() if config.freeze_backbone else self._of_own_weights()
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
        self.sampler = ClipSampler(self.train, self.config.clip, config.batch, config.seed, config.busy)
        self._optimize(parts)

    def _on_released(self) -> AdaptedModel:
        """A control adapter on a released model."""
        config = self.config
        assert config.init is not None, "TrainConfig has seen to it"
        torch.manual_seed(config.seed)
        model = adapt(
            config.init, config.out, self.train, prompt=config.prompt, noise=config.noise, clip=config.clip,
            batch=config.batch // self.group.size, device=config.device,
        )  # fmt: skip
        clip = 1 + (config.clip - 1) // model.codec.time * model.codec.time
        self.config = replace(config, noise=model.config.noise, prompt=model.config.prompt, clip=clip)
        if is_adapted(config.init) and not config.resume:
            self.before = inherit_adapter(model, config.init)
        return model

    def _of_own_weights(self) -> WorldModel:
        """A model that is all to be trained."""
        config = self.config
        height, width = self.train.frames.shape[1:3]
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
        model = WorldModel(shape, self.train.action_space).to(config.device)
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

    @property
    def frames_a_step(self) -> int:
        return self.config.batch * self.config.clip

    def validate(self, batches: int = 4) -> dict[str, float]:
        """Means over fixed clips of held-out episodes, by the averaged weights; the first process finds them, others nothing."""
        model, config = self.averaged, self.config
        if not self.group.first:
            return {}
        at_once = config.batch // self.group.size if config.freeze_backbone else 16  # what there is room for
        sampler = ClipSampler(self.held_out, config.clip, at_once, seed=1)
        generator = torch.Generator(config.device).manual_seed(config.seed)
        objective, found = replace(config.objective, action_dropout=0.0, errors=0.0, imagined=0.0), []
        model.eval()
        with torch.no_grad():
            for index in range(-(-16 * batches // at_once)):
                batch = Batch.from_clips(sampler.batch(index), model)
                loss = world_loss(model, batch, objective, generator)
                left = {"noise_left": noise_left(model, batch, loss)} if model.denoiser else {}
                found.append(loss.metrics | left)
        return {name: float(np.mean([metrics[name].item() for metrics in found])) for name in found[0]}

    def _write(self, about: dict[str, Any]) -> None:
        """The world and its start frames."""
        model, config = self.averaged, self.config
        if self.group.first:
            save_starts(config.out, self.held_out, frames=self._context)
            save_model(config.out, model, {**about, "before": self.before})

    def _parents(self) -> dict[str, dict[str, Any]]:
        config, parents = self.config, {}
        if config.codec:
            parents["codec"] = load_autoencoder(config.codec)[1]
        if config.init and not config.freeze_backbone:
            parents["init"] = read_world(find_world(config.init), ModelConfig)[2]
        elif config.init and is_adapted(config.init):
            parents["init"] = read_world(config.init, AdaptedConfig)[2]
        return parents

    def _begun(self) -> dict[str, Any]:
        return {"init": self.config.init and str(self.config.init), "before": self.before}

    def _load(self) -> None:
        super()._load()
        reached = self._reached()
        self.before = reached["before"]
        self.config = replace(self.config, init=reached["init"] and Path(reached["init"]))

    def _train_step(self) -> dict[str, float]:
        config, group = self.config, self.group
        generator = torch.Generator(config.device).manual_seed(config.seed * 1_000_003 + self.step)
        batch = Batch.from_clips(self.sampler.batch(self.step, group.share(config.batch)), self.model)
        plain = "denoiser" in self.optimizers and self.step % config.objective.score_every == 0
        autocast = torch.autocast(config.device.split(":")[0], torch.bfloat16, enabled=config.device.startswith("cuda"))
        with autocast:
            loss = world_loss(self.model, batch, config.objective, generator, plain, group, self.replica)
        metrics, norm = dict(loss.metrics), self._update("flow", loss.value, config.learning_rate)
        if plain:
            with autocast:
                error = score_loss(self.model, loss, generator, group, self.denoiser_replica)
            self._update("denoiser", error, config.denoiser_learning_rate)
            metrics["score_loss"] = error.detach()
        self.average.update_parameters(self.model)
        self.step += 1
        means = group.average(torch.stack(list(metrics.values()))).tolist()
        values = dict(zip(metrics, means, strict=True))
        return {**values, "gradient_norm": norm, "learning_rate": self.optimizers["flow"].param_groups[0]["lr"]}

    def _told(self, metrics: dict[str, float]) -> str:
        return f"{metrics['nats_per_dim'] / math.log(2):.3f} bits/dim"

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
    with joined(config.device) as group, alone_in(config.out) if group.first else nullcontext():
        return Trainer(replace(config, device=group.device), group).run()
