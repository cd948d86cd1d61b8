"""`sfv-world generate`: a prompt, a start image or both become a film (or a picture) of a released-layout world.

The folder of such a world is what `sfv-world convert` makes, with the VAE in `vae` and the T5 encoder with its tokenizer in
`text_encoder`, in the layouts of `diffusers` and `transformers`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from tqdm import tqdm

from sfv_world.codec.vae import ImageCodec, WanCodec, load_codec, to_pixels
from sfv_world.film import write_image, write_video
from sfv_world.given import DEVICE, check_counts, check_folder
from sfv_world.memory import Need, check_memory
from sfv_world.released.backbone import check_text_encoder, find_parts
from sfv_world.released.clips import Clip, ClipConfig, draw_clips
from sfv_world.released.config import ReleasedConfig
from sfv_world.released.load import load_released
from sfv_world.released.memory import stored_numbers
from sfv_world.released.plan import sampling_needs
from sfv_world.released.text import PromptCache, format_prompt
from sfv_world.training.distributed import Group, joined

VIDEO, IMAGE = (480, 848, 81), (256, 256, 1)
"""Height, width and frames that models of videos and of images were made for."""

SMALLER = (
    "Give fewer pixels (--height, --width), a smaller --clip.chunk (and --clip.context), no guidance (--clip.guidance 0), --dtype "
    "bfloat16, a larger device or several (torchrun --nproc-per-node 2 -m sfv_world generate ...)."
)
ELSEWHERE = (
    "Give --dtype bfloat16, or run once with this --dtype where there is room and bring the folder of --prompts."
)


@dataclass(frozen=True)
class GenerateConfig:
    """A world, what it is to show, and where to."""

    world: Path
    """Folder of a converted model, which `sfv-world convert` makes."""
    out: Path
    """File to make: .mp4 from a model of videos, .png from one of images."""
    prompt: str = ""
    """What is to be seen; guidance acts where there is one."""
    image: Path | None = None
    """A picture that the film starts with, cut to its size; a model of videos only."""
    frames: int | None = None
    """Frames of the film, which goes on in chunks where it is longer than one; none: 81, of an image 1."""
    fps: int = 16
    """Frames a second, of the film and as the model is told."""
    height: int | None = None
    """Rows of a frame, in pixels; none: 480, of an image 256."""
    width: int | None = None
    """Columns of a frame, in pixels; none: 848, of an image 256."""
    clip: ClipConfig = field(default_factory=lambda: ClipConfig(guidance=3.0))
    """How it is drawn."""
    vae: Path | None = None
    """Folder of the VAE; none: `vae` in the world's."""
    text_encoder: Path | None = None
    """Folder of the T5 encoder; none: `text_encoder` in the world's."""
    prompts: Path | None = None
    """Folder where states of prompts are kept; none: `prompts` in the world's."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16" if torch.cuda.is_available() else "float32"
    """What the layers compute in."""
    device: str = DEVICE
    """Where to compute."""

    def __post_init__(self) -> None:
        check_counts(self, "height", "width", "frames", "fps")


@dataclass(frozen=True)
class Job:
    """What is to be made, once it is known that the parts fit each other."""

    shape: ReleasedConfig
    codec: WanCodec | ImageCodec
    """Without its weights."""
    height: int
    width: int
    frames: int
    clip: ClipConfig

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a frame."""
        side = self.codec.space * self.shape.patch_size
        return self.height // side, self.width // side


def prepare(config: GenerateConfig) -> Job:
    """Reads configurations alone, and holds them against each other and what is asked for.

    Raises:
        ImportError: if `diffusers` is not installed.
        ValueError: if something is missing or does not fit.
    """
    shape, codec = find_parts(config.world, config.vae)
    is_video = shape.shallow_block_local
    height, width, frames = VIDEO if is_video else IMAGE
    height, width, frames = config.height or height, config.width or width, config.frames or frames
    kind, suffix = ("videos", ".mp4") if is_video else ("images", ".png")
    if config.out.suffix != suffix:
        raise ValueError(f"out: expected a {suffix} file, since this is a model of {kind}, got {config.out}.")
    if config.out.is_dir():
        raise ValueError(f"out: expected a file, got the folder {config.out}.")
    check_folder("out", config.out.parent)
    if is_video and config.image is not None and frames == 1:
        raise ValueError("frames: expected at least 2 with an image to begin with, got 1.")
    if not is_video and (frames != 1 or config.image is not None):
        what = f"{frames} frames" if config.image is None else f"the image {config.image}"
        raise ValueError(
            f"frames, image: expected one frame and no image to begin with of a model of images, got {what}."
        )
    side = codec.space * shape.patch_size
    if height % side or width % side:
        raise ValueError(f"height, width: expected multiples of {side} pixels, got {height} x {width}.")
    check_text_encoder(config.text_encoder or config.world / "text_encoder", shape)
    # Without a caption both prompts are the same, and guidance does nothing but cost.
    clip = config.clip if config.prompt else replace(config.clip, guidance=0.0)
    return Job(shape, codec, height, width, frames, replace(clip, noise=clip.noise or shape.noise))


def needs(config: GenerateConfig, job: Job, devices: int = 1) -> list[Need]:
    """What drawing the clip holds at once, on each of the devices that share the deep block."""
    latent_frames, guided = min(job.codec.latent_frames(job.frames), job.clip.chunk), job.clip.guidance > 0
    size = (job.height, job.width, latent_frames)
    return sampling_needs(job.shape, job.codec, *size, config.dtype, guided, devices)


def generate(config: GenerateConfig) -> Clip:
    """Makes a film or a picture, prints what is known of it, and returns the clip.

    Processes that `torchrun` started draw one clip together: each keeps a share of the deep block, for models that do not fit
    a single device. The first one writes it.

    Raises:
        ImportError: if the extra `released` is not installed.
        ValueError: if parts are missing, damaged, or do not fit each other or into memory, or there is no such device. Nothing is
            written then but states of prompts.
    """
    with joined(config.device) as group:
        return _generate(replace(config, device=group.device), group)


def _generate(config: GenerateConfig, group: Group) -> Clip:
    """One process's part in it."""
    job, device, dtype = prepare(config), torch.device(config.device), getattr(torch, config.dtype)
    image = None if config.image is None else read_image(config.image, job.height, job.width)
    captions = [config.prompt, ""] if job.clip.guidance else [config.prompt]
    fps = config.fps if job.shape.shallow_block_local else None
    prompts = [format_prompt(text, job.clip.noise or job.shape.noise, job.height, job.width, fps) for text in captions]
    encoder = config.text_encoder or config.world / "text_encoder"
    cache = PromptCache(encoder, config.prompts or config.world / "prompts", job.shape.txt_size, dtype)
    check_memory(needs(config, job, group.size), device, SMALLER)
    if cache.missing(prompts):
        check_folder("prompts", cache.folder)
        numbers = stored_numbers(encoder, ("encoder.", "shared."))
        check_memory([Need("T5 encoder", float(dtype.itemsize * numbers))], device, ELSEWHERE)
    states = cache.states(prompts, device).to(device)
    codec = load_codec(config.vae or config.world / "vae", device, dtype)
    flow = load_released(config.world, job.shape, device, dtype, spread=group.size > 1).requires_grad_(False)
    start = None if image is None else codec.encode(to_pixels(image[None, None]).to(device))
    latent_frames = codec.latent_frames(job.frames)
    drawn = latent_frames - (start is not None)
    total = drawn + latent_frames
    with tqdm(total=total, desc="deep flow, decoder", unit="latent frame", disable=not group.first) as bar:
        clip = draw_clips(
            flow, codec, states[:1], job.grid, latent_frames, job.clip,
            unconditional=states[1:] if job.clip.guidance else None, start=start, progress=lambda stage: bar.update(),
        )  # fmt: skip
    if not group.first:
        return clip
    frames = clip.frames[0, : job.frames].numpy()
    if job.shape.shallow_block_local:
        write_video(config.out, frames, float(config.fps), scale=1)
    else:
        write_image(config.out, frames[0])
    print(describe(config, job, clip, drawn))
    return clip


def describe(config: GenerateConfig, job: Job, clip: Clip, drawn: int) -> str:
    """What is known of a clip, in a few lines."""
    tolerance = job.clip.decoding.tolerance
    missed = int((~(clip.certificate <= tolerance)).sum())
    likelihood = float(clip.log_prob.double().mean()) / job.shape.token_channels
    of = "guided, so no draw from the density below" if clip.guided else "not guided"
    lines = [
        f"{config.out}: {job.frames} frames of {job.height} x {job.width}, {drawn} latent frames drawn, {of}",
        f"log-likelihood of the noised latents under the model without guidance: {likelihood:.4f} nats a dimension",
        f"{float(clip.sweeps.float().mean()):.1f} sweeps of the deep block a latent frame of {job.grid[0] * job.grid[1]} tokens, "
        f"largest certificate {float(clip.certificate.max()):.1e}",
    ]
    if missed:
        lines.append(
            f"{missed} latent frames missed the tolerance {tolerance:g}: allow more sweeps (--clip.decoding.max-sweeps)"
        )
    return "\n".join(lines)


def read_image(path: Path, height: int, width: int) -> UInt8[Tensor, "height width 3"]:
    """A picture, scaled to cover the size and cut to it around its middle.

    Raises:
        ValueError: if there is none that can be read.
    """
    data = np.fromfile(path, np.uint8) if path.is_file() else np.empty(0, np.uint8)
    found = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    if found is None:
        raise ValueError(f"image: expected a picture (PNG, JPEG), got {path}, which is none that can be read.")
    scale = max(height / found.shape[0], width / found.shape[1])
    size = max(width, round(scale * found.shape[1])), max(height, round(scale * found.shape[0]))
    found = cv2.resize(found, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    top, left = (found.shape[0] - height) // 2, (found.shape[1] - width) // 2
    return torch.from_numpy(cv2.cvtColor(found[top : top + height, left : left + width], cv2.COLOR_BGR2RGB))
