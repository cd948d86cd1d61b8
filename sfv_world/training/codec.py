"""Training of the latent codec's autoencoder: a recording in, a codec's folder out.

The loss of a frame is the negative log-likelihood of its pixels under a normal distribution around the reconstruction, with
one learned width; the other half of the variational bound, the KL, is held constant (see `codec.latent`).
"""

import os
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sfv_world.checkpoint import save_autoencoder
from sfv_world.codec.latent import Autoencoder, AutoencoderConfig
from sfv_world.codec.vae import to_frames, to_pixels
from sfv_world.film import decibels, write_image
from sfv_world.given import alone_in, given_device
from sfv_world.training.run import Run
from sfv_world.training.schedule import RunConfig, moving_average


@dataclass(frozen=True)
class TrainCodecConfig(RunConfig):
    """How to train the autoencoder of a latent codec."""

    space: int = 8
    """Side of the square of pixels that a place of the latents stands for: 2, 4, 8, ..."""
    latents: int = 16
    """Latents of a place."""
    base: int = 96
    """Channels of the deepest layers, which decide the size: about 0.5 million parameters."""
    noise: float = 0.3
    """Standard deviation of the noise on latents, which have variance 1; worlds of this codec have the same."""
    batch: int = 32
    """Frames of a batch."""
    ema: float = 0.995
    """Decay of the moving average of the weights, a step; less in the first steps."""


class Reconstruction(nn.Module):
    """An autoencoder and what it is trained by: a normal distribution of pixels around its reconstructions."""

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.autoencoder = Autoencoder(config)
        self.log_width = nn.Parameter(torch.tensor(-1.0))

    def forward(self, pixels: Float[Tensor, "n h w 3"], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """(negative log-likelihood of a colour value up to a constant, mean square error), from noised latents."""
        error = (reconstruct(self.autoencoder, pixels, generator) - pixels).square().mean()
        return 0.5 * error * (-2 * self.log_width).exp() + self.log_width, error


def reconstruct(
    autoencoder: Autoencoder, pixels: Float[Tensor, "n h w 3"], generator: torch.Generator, noised: bool = True
) -> Float[Tensor, "n h w 3"]:
    """Pixels decoded from the latents of frames, noised as worlds have them or clean."""
    latents = autoencoder.encode(pixels)
    if noised:
        normal = torch.randn(latents.shape, generator=generator, device=latents.device)
        latents = latents + autoencoder.config.noise * normal
    return autoencoder.decode(latents)


class CodecTrainer(Run):
    """One training run of an autoencoder."""

    config: TrainCodecConfig

    def __init__(self, config: TrainCodecConfig):
        given_device(config.device)
        super().__init__(config)
        torch.manual_seed(config.seed)
        height, width = self.train.frames.shape[1:3]
        shape = AutoencoderConfig(height, width, config.space, config.latents, config.base, config.noise)
        self.model = Reconstruction(shape).to(config.device)
        self.average = AveragedModel(self.model, multi_avg_fn=moving_average(config.ema))
        self._optimize({"codec": list(self.model.parameters())})

    @property
    def averaged(self) -> Autoencoder:
        """The autoencoder with the moving average of the weights: the one that is saved."""
        return cast(Reconstruction, self.average.module).autoencoder

    @property
    def frames_a_step(self) -> int:
        return self.config.batch

    @torch.no_grad()
    def validate(self, frames: int = 500) -> dict[str, float]:
        """PSNR of held-out reconstructions by the averaged weights in dB, from clean latents and from noised ones."""
        self.averaged.eval().standardise(self._some(self.train.frames, 1000))
        real = self._some(self.held_out.frames, frames)
        found = {}
        for name, noised in (("psnr_clean", False), ("psnr_noised", True)):
            generator, error = self._generator(0), 0.0
            for part in real.split(250):
                shown = to_frames(reconstruct(self.averaged, to_pixels(part), generator, noised))
                error += (shown.float() - part.float()).square().mean((1, 2, 3)).sum().item()
            found[name] = decibels(error / len(real))
        return found

    def _write(self, about: dict[str, Any]) -> None:
        save_autoencoder(self.config.out, self.averaged, about)

    @torch.no_grad()
    def _sample(self) -> None:
        """A sheet of held-out frames above their reconstructions from noised latents."""
        real = self._some(self.held_out.frames, 24)
        found = to_frames(reconstruct(self.averaged, to_pixels(real), self._generator(0)))
        pairs = torch.stack([real, found], dim=1).cpu().numpy()
        rows = 3 if len(pairs) % 3 == 0 else 1
        write_image(
            self.config.out / "reconstructions.png", rearrange(pairs, "(r n) two h w c -> (r two h) (n w) c", r=rows)
        )

    def _train_step(self) -> dict[str, float]:
        config = self.config
        rows = np.random.default_rng([config.seed, self.step]).integers(len(self.train.frames), size=config.batch)
        frames = torch.from_numpy(self.train.frames[rows]).to(config.device)
        loss, error = self.model.train()(to_pixels(frames), self._generator(self.step))
        norm = self._update("codec", loss, config.learning_rate)
        self.average.update_parameters(self.model)
        self.step += 1
        return {"loss": loss.item(), "psnr": decibels(127.5**2 * error.item()), "gradient_norm": norm}

    def _told(self, metrics: dict[str, float]) -> str:
        return f"{metrics['psnr']:.1f} dB"

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator(self.config.device).manual_seed(self.config.seed * 1_000_003 + step)

    def _some(self, frames: UInt8[np.ndarray, "n h w 3"], count: int) -> UInt8[Tensor, "m h w 3"]:
        """At most so many frames, the same ones every time."""
        chosen = np.random.default_rng(self.config.seed).permutation(len(frames))[:count]
        return torch.from_numpy(frames[chosen]).to(self.config.device)


def train_codec(config: TrainCodecConfig) -> dict[str, float]:
    """Trains an autoencoder (see `TrainCodecConfig`) and returns the last validation's numbers.

    Raises:
        ValueError: if `torchrun` started more than one process: latents are standardised by the batch, which none would have whole.
    """
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ValueError(f"train-codec: expected one process, got {processes}. Start it without torchrun.")
    with alone_in(config.out):
        return CodecTrainer(config).run()
