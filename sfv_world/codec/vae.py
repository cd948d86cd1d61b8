"""Latent codecs around the autoencoders of `diffusers`: frames to latents of a VAE and back, in one piece or as a stream.

    pixels (b, n, h, w, 3) in [-1, 1] --encode--> latents (b, t, c, h / space, w / space) --decode--> pixels

`WanCodec` is Wan's causal video VAE: the first frame is one latent frame, every `time` frames after it are one more.
`ImageCodec` is Stable Diffusion's, in which every frame is a latent frame. The Wan VAE's convolutions look back in time, so a
stream needs what they have seen: a `Memory`, passed in and changed in place. A stream in any pieces equals one piece.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from sfv_world.pretrained import import_extra, load_network, read_config

TEMPORAL_SCALE = 0.6
"""What STARFlow-V multiplies normalised latents after a video's first by."""


@dataclass
class Memory:
    """What a causal network remembers of a stream; empty where a video begins."""

    MARKS: ClassVar = (None, "Rep")
    """What `diffusers` remembers where it is no tensor: nothing, or that there was a first frame only."""

    features: list[Any] = field(default_factory=list)
    """For every convolution, the last frames that it read."""
    frames: int = 0
    """Latent frames so far."""

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What of it are tensors, by names that begin with `name`; videos come first in each."""
        return {f"{name}.{n}": x for n, x in enumerate(self.features) if isinstance(x, Tensor)}

    @property
    def outline(self) -> list[int]:
        """What of it are none: the latent frames so far, and for every feature which of the `MARKS` it is, or -1, a tensor."""
        return [self.frames, *(-1 if isinstance(x, Tensor) else self.MARKS.index(x) for x in self.features)]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str, outline: Sequence[int]) -> "Memory":
        """The one that has these `tensors` and this `outline`."""
        frames, *marks = outline
        return cls([tensors[f"{name}.{n}"] if m < 0 else cls.MARKS[m] for n, m in enumerate(marks)], frames)


def to_pixels(frames: UInt8[Tensor, "*b h w 3"]) -> Float[Tensor, "*b h w 3"]:
    """uint8 frames -> pixels in [-1, 1]."""
    return frames.float() / 127.5 - 1


def to_frames(pixels: Float[Tensor, "*b h w 3"]) -> UInt8[Tensor, "*b h w 3"]:
    """Pixels in [-1, 1] -> the nearest uint8 frames."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).byte()


class WanCodec(nn.Module):
    """Wan's video VAE: normalised, temporally scaled latents, by frame groups.

    Args:
        vae: an `AutoencoderKLWan`.
        temporal_scale: of all latents but a video's first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, vae: Any, temporal_scale: float = TEMPORAL_SCALE):
        super().__init__()
        shape, self.vae, self.temporal_scale = vae.config, vae, temporal_scale
        self.channels: int = shape.z_dim
        self.width: int = shape.decoder_base_dim or shape.base_dim
        self.patch: int = shape.patch_size or 1
        self.space: int = 2 ** (len(shape.dim_mult) - 1) * self.patch
        self.time: int = 2 ** sum(shape.temperal_downsample)
        for name, values in (("mean", shape.latents_mean), ("std", shape.latents_std)):
            if len(values) != self.channels:
                raise ValueError(f"latents_{name}: expected {self.channels} numbers, one a channel, got {len(values)}.")
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "b n h w 3"], memory: Memory | None = None
    ) -> Float[Tensor, "b t c h_latent w_latent"]:
        """Pixels in [-1, 1] -> latents: the posterior's mean, normalised.

        Args:
            pixels: 1 + a multiple of `time` frames where a video begins, a multiple of `time` after that.
            memory: of the frames before; none: a video begins here, and nothing is remembered.

        Raises:
            ValueError: if there are other numbers of frames, or the size is no multiple of `space`.
        """
        memory = Memory() if memory is None else memory
        check_size(pixels, self.space)
        count, begins = pixels.shape[1], int(memory.frames == 0)
        if count < 1 or (count - begins) % self.time:
            expected = f"{begins} + a multiple of {self.time}" if begins else f"a multiple of {self.time}"
            raise ValueError(f"pixels: expected {expected} frames, got {count}.")
        x = rearrange(pixels, "b n (h i) (w j) k -> b (k j i) n h w", i=self.patch, j=self.patch).to(self.vae.dtype)
        encoder, latents = self.vae.encoder, []
        self._prepare(memory, encoder)
        for group in x.split([begins] * begins + [self.time] * ((count - begins) // self.time), dim=2):
            parameters = self.vae.quant_conv(encoder(group, feat_cache=memory.features, feat_idx=[0]))
            mean = rearrange(parameters.chunk(2, dim=1)[0].float(), "b c 1 h w -> b c h w")
            latents.append((mean - self.mean) / self.std * self._scale(memory))
            memory.frames += 1
        return torch.stack(latents, dim=1)

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "b t c h_latent w_latent"], memory: Memory | None = None
    ) -> Float[Tensor, "b n h w 3"]:
        """Latents -> pixels in [-1, 1]: one frame of a video's first latent, `time` of any other.

        Args:
            latents: as `encode` gives them.
            memory: of the latents before; none: a video begins here, and nothing is remembered.
        """
        memory = Memory() if memory is None else memory
        decoder, pixels = self.vae.decoder, []
        self._prepare(memory, decoder)
        for latent in latents.unbind(1):
            z = (latent / self._scale(memory) * self.std + self.mean).to(self.vae.dtype)
            x = self.vae.post_quant_conv(z[:, :, None])
            x = decoder(x, feat_cache=memory.features, feat_idx=[0], first_chunk=memory.frames == 0)
            memory.frames += 1
            pixels.append(rearrange(x, "b (k j i) n h w -> b n (h i) (w j) k", i=self.patch, j=self.patch))
        return torch.cat(pixels, dim=1).float().clamp(-1, 1)

    def latent_frames(self, frames: int) -> int:
        """The latent frames that cover `frames` frames of a video."""
        return 1 + -(-(frames - 1) // self.time)

    def _scale(self, memory: Memory) -> float:
        return self.temporal_scale if memory.frames else 1.0

    @staticmethod
    def _prepare(memory: Memory, network: nn.Module) -> None:
        if not memory.features:
            memory.features = [None] * sum(isinstance(module, nn.Conv3d) for module in network.modules())


class ImageCodec(nn.Module):
    """Stable Diffusion's image VAE: every frame on its own, latents times its scaling factor. Has no use for a memory.

    Args:
        vae: an `AutoencoderKL`.
    """

    time, patch = 1, 1

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae
        self.channels: int = vae.config.latent_channels
        self.width: int = vae.config.block_out_channels[0]
        self.space: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scale, self.shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "b n h w 3"], memory: Memory | None = None
    ) -> Float[Tensor, "b n c h_latent w_latent"]:
        """Pixels in [-1, 1] -> latents: the posterior's mean, shifted and scaled.

        Raises:
            ValueError: if the size is no multiple of `space`.
        """
        check_size(pixels, self.space)
        x = rearrange(pixels, "b n h w k -> (b n) k h w").to(self.vae.dtype)
        latents = (self.vae.encode(x).latent_dist.mode().float() - self.shift) * self.scale
        return rearrange(latents, "(b n) c h w -> b n c h w", n=pixels.shape[1])

    @torch.no_grad()
    def decode(
        self, latents: Float[Tensor, "b n c h_latent w_latent"], memory: Memory | None = None
    ) -> Float[Tensor, "b n h w 3"]:
        """Latents -> pixels in [-1, 1]."""
        z = rearrange(latents, "b n c h w -> (b n) c h w") / self.scale + self.shift
        pixels = self.vae.decode(z.to(self.vae.dtype)).sample.float().clamp(-1, 1)
        return rearrange(pixels, "(b n) k h w -> b n h w k", n=latents.shape[1])

    def latent_frames(self, frames: int) -> int:
        """As many as frames."""
        return frames


def check_size(pixels: Float[Tensor, "b n h w 3"], space: int) -> None:
    """Raises ValueError if a VAE that compresses by `space` cannot hold frames of this size."""
    if any(side % space for side in pixels.shape[2:4]):
        size = " x ".join(map(str, pixels.shape[2:4]))
        raise ValueError(f"pixels: expected height and width to be multiples of {space}, got {size}. Resize them.")


CODECS: dict[str, type[WanCodec] | type[ImageCodec]] = {"AutoencoderKLWan": WanCodec, "AutoencoderKL": ImageCodec}


def find_codec(folder: str | Path) -> WanCodec | ImageCodec:
    """The codec of a VAE's folder without its weights, for its shape.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if the folder holds no VAE of a kind that is known.
    """
    name, config = _named(Path(folder))
    kind = getattr(import_extra("diffusers"), name)
    try:
        with torch.device("meta"):
            vae = kind.from_config(config)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{folder}: expected the configuration of an {name}, got one it does not take ({error})."
        ) from error
    return CODECS[name](vae)


def load_codec(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> WanCodec | ImageCodec:
    """The codec of a VAE's folder in the layout of `diffusers`.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if the folder holds no VAE of a kind that is known, or an incomplete one.

    Example:
        >>> codec = load_codec("Wan2.2-TI2V-5B-Diffusers/vae", "cuda", torch.bfloat16)  # doctest: +SKIP
    """
    name, _ = _named(Path(folder))
    return CODECS[name](load_network("diffusers", name, Path(folder), device, dtype)).to(device)


def _named(folder: Path) -> tuple[str, dict[str, Any]]:
    config = read_config(folder, "a VAE")
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in CODECS:
        raise ValueError(f"{folder}: expected a VAE of {' or '.join(CODECS)}, got {name!r}.")
    return name, config
