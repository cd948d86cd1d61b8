"""Training of the latent codec's autoencoder: a recording in, a codec's folder out.

The loss of a frame is the negative log-likelihood of its pixels under a normal distribution around the reconstruction, with
one learned width; the other half of the variational bound, the KL, is held constant (see `codec.latent`). Everything
random in a step follows from (seed, step). The folder holds the moving average of the weights.
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sfv_world.checkpoint import CODEC, CONFIG, check_vacant, save_autoencoder
from sfv_world.codec.latent import Autoencoder, AutoencoderConfig
from sfv_world.codec.vae import to_frames, to_pixels
from sfv_world.data.clips import load_episodes
from sfv_world.film import write_image
from sfv_world.given import DEVICE, given_device, set_threads
from sfv_world.interrupt import patient
from sfv_world.training.schedule import RunBar, check_run, moving_average, progress, rate


@dataclass(frozen=True)
class TrainCodecConfig:
    """How to train the autoencoder of a latent codec."""

    data: Path
    """Folder of a Minari dataset with image observations (see `sfv-world collect`)."""
    out: Path
    """Folder of the codec."""
    space: int = 8
    """Side of the square of pixels that a place of the latents stands for: 2, 4, 8, ..."""
    latents: int = 16
    """Latents of a place."""
    base: int = 96
    """Channels of the deepest layers, which decide the size: about 0.5 million parameters."""
    noise: float = 0.3
    """Standard deviation of the noise on latents, which have variance 1; worlds of this codec have the same."""
    steps: int | None = None
    """Stop after this many steps."""
    minutes: float | None = None
    """Stop after this many minutes of training. With both, whichever comes first."""
    batch: int = 32
    """Frames of a batch."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup: int = 50
    """Steps in which the learning rate rises; after them it falls along a cosine to 1% of its peak."""
    weight_decay: float = 0.01
    """Weight decay."""
    ema: float = 0.995
    """Decay of the moving average of the weights, a step; less in the first steps."""
    held_out: float = 0.05
    """Part of the episodes that is never trained on. Choose this and the seed as for the worlds to come."""
    validate_minutes: float = 2.0
    """Minutes between validations, pictures and checkpoints."""
    seed: int = 0
    """Seed of the split, the weights, the frames and the noise."""
    device: str = DEVICE
    """Where to train."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""

    def __post_init__(self) -> None:
        check_run(self)


class CodecTrainer:
    """One training run of an autoencoder."""

    def __init__(self, config: TrainCodecConfig):
        self.config = config
        given_device(config.device)
        set_threads(config.threads)
        check_vacant(config.out, "codec or world", CODEC, CONFIG)
        episodes = load_episodes(config.data)
        self.train, self.held_out = episodes.split(config.held_out, config.seed)
        torch.manual_seed(config.seed)
        height, width = episodes.frames.shape[1:3]
        shape = AutoencoderConfig(height, width, config.space, config.latents, config.base, config.noise)
        self.model = Autoencoder(shape).to(config.device)
        self.width = nn.Parameter(torch.tensor(-1.0, device=config.device))
        """log of the learned width of the pixels' distribution."""
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(config.ema))
        groups: list[dict[str, Any]] = [
            {"params": list(self.model.parameters())},
            {"params": [self.width], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step, self.elapsed = 0, 0.0

    @property
    def averaged(self) -> Autoencoder:
        """The autoencoder with the moving average of the weights: the one that is saved."""
        return cast(Autoencoder, self.average.module)

    def run(self) -> dict[str, float]:
        """Trains to the end and returns the last validation's numbers."""
        config, validation = self.config, {}
        size = sum(parameter.numel() for parameter in self.model.parameters())
        rows, columns = (side // config.space for side in self.train.frames.shape[1:3])
        print(f"{size / 1e6:.2f} M parameters, latents of {rows} x {columns} x {config.latents} a frame")
        bar = RunBar(config, self.step, self.elapsed)
        last_validation = 0.0
        with patient() as interrupted, closing(bar.bar):
            while progress(config, self.step, self.elapsed) < 1:
                began = time.perf_counter()
                psnr = self._train_step()
                self.elapsed += time.perf_counter() - began
                speed = config.batch * self.step / max(self.elapsed, 1e-9)
                bar.show(self.step, self.elapsed, f"{psnr:.1f} dB, {speed:.0f} frames/s")
                stop = interrupted()
                if (
                    self.elapsed - last_validation > 60 * config.validate_minutes
                    or progress(config, self.step, self.elapsed) >= 1
                    or stop
                ):
                    last_validation = self.elapsed
                    validation = self.validate()
                    numbers = ", ".join(f"{name} {value:.2f} dB" for name, value in validation.items())
                    bar.bar.write(f"step {self.step}, {self.elapsed / 60:.1f} min: held out {numbers}")
                    self.save(validation)
                if stop:
                    bar.bar.write(f"stopped after step {self.step}: {config.out} keeps it")
                    raise KeyboardInterrupt
        return validation

    @torch.no_grad()
    def validate(self, frames: int = 500) -> dict[str, float]:
        """PSNR of held-out reconstructions by the averaged weights, from clean latents and from noised ones."""
        model = self.averaged.eval()
        model.standardise(self._some(self.train.frames, 1000))
        real = self._some(self.held_out.frames, frames)
        errors = np.zeros(2)
        for first in range(0, len(real), 250):
            part = real[first : first + 250]
            for index, noise in enumerate((0.0, self.config.noise)):
                error = to_frames(self._reconstruct(model, part, noise)).float() - part.float()
                errors[index] += error.square().mean((1, 2, 3)).sum().item()
        decibels = 10 * np.log10(255**2 / np.maximum(errors / len(real), 1e-9))
        return {"psnr_clean": float(decibels[0]), "psnr_noised": float(decibels[1])}

    def save(self, validation: dict[str, float]) -> None:
        """Writes the codec and a sheet of held-out frames above their reconstructions from noised latents."""
        config = self.config
        about = {
            "training": TypeAdapter(TrainCodecConfig).dump_python(config, mode="json"),
            "data": self.train.metadata,
            "steps": self.step,
            "minutes": round(self.elapsed / 60, 1),
            "held_out": {name: round(value, 2) for name, value in validation.items()},
        }
        save_autoencoder(config.out, self.averaged, about)
        real = self._some(self.held_out.frames, 24)
        with torch.no_grad():
            found = to_frames(self._reconstruct(self.averaged, real, config.noise))
        pairs = torch.stack([real, found], dim=1).cpu().numpy()
        rows = 3 if len(pairs) % 3 == 0 else 1
        write_image(
            config.out / "reconstructions.png", rearrange(pairs, "(r n) two h w c -> (r two h) (n w) c", r=rows)
        )

    def _train_step(self) -> float:
        """One step; the PSNR of its reconstructions from noised latents, in dB."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate(config, self.step, self.elapsed)
        rows = np.random.default_rng([config.seed, self.step]).integers(len(self.train.frames), size=config.batch)
        frames = torch.from_numpy(self.train.frames[rows]).to(config.device)
        self.model.train()
        error = (self._reconstruct(self.model, frames, config.noise, self.step) - to_pixels(frames)).square().mean()
        loss = 0.5 * error * (-2 * self.width).exp() + self.width
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(loss) or not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the loss is {loss.item()} and its gradient {norm.item()}, expected finite numbers. "
                "Begin again with a lower --learning-rate."
            )
        self.optimizer.step()
        self.step += 1
        self.average.update_parameters(self.model)
        return 10 * math.log10(4 / max(error.item(), 1e-9))

    def _reconstruct(
        self, model: Autoencoder, frames: UInt8[Tensor, "n h w 3"], noise: float, step: int = 0
    ) -> Float[Tensor, "n h w 3"]:
        """Pixels decoded from the latents of frames, noised."""
        latents = model.encode(to_pixels(frames))
        generator = torch.Generator(latents.device).manual_seed(self.config.seed * 1_000_003 + step)
        normal = torch.randn(latents.shape, generator=generator, device=latents.device)
        return model.decode(latents + noise * normal)

    def _some(self, frames: UInt8[np.ndarray, "n h w 3"], count: int) -> UInt8[Tensor, "m h w 3"]:
        """At most so many frames, the same ones every time."""
        chosen = np.random.default_rng(self.config.seed).permutation(len(frames))[:count]
        return torch.from_numpy(frames[chosen]).to(self.config.device)


def train_codec(config: TrainCodecConfig) -> dict[str, float]:
    """Trains an autoencoder (see `TrainCodecConfig`) and returns the last validation's numbers."""
    return CodecTrainer(config).run()
