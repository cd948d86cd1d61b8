"""Begins the training of a control adapter on a released model that stays as it is (`--init ... --freeze-backbone`)."""

import os
from dataclasses import replace
from pathlib import Path

from sfv_world.checkpoint import CONFIG, read_world
from sfv_world.data.clips import Episodes
from sfv_world.released.adapted import AdaptedConfig, AdaptedModel, is_adapted
from sfv_world.released.backbone import Backbone, check_text_encoder, fingerprint
from sfv_world.released.text import format_prompt, load_text_encoder

FPS = 16
"""Frames a second that the model is told of where a recording does not say."""


def adapt(
    folder: Path, out: Path, episodes: Episodes, *, prompt: str, noise: float | None, clip: int, batch: int, device: str
) -> AdaptedModel:
    """A model on the released one in `folder`, its adapter not trained yet. Nothing is loaded before it is known to fit.

    Args:
        folder: made by `sfv-world convert`, with the VAE in `vae` and the T5 encoder in `text_encoder`; or a world on such a
            model, which then decides the prompt and the noise, too, where these are not given.
        out: folder that the world will have.
        episodes: what it will learn from.
        prompt: what the model is told to show.
        noise: standard deviation of the noise on latents; none: that of the published models.
        clip: frames of a clip.
        batch: clips that a step is trained on here.
        device: where to load it.

    Raises:
        ImportError: if the extra `released` is not installed.
        ValueError: if something is missing, does not fit, or is not what a run in `out` began with.
    """
    height, width = episodes.frames.shape[1:3]
    if is_adapted(folder):
        other = read_world(folder, AdaptedConfig)[0]
        folder = (folder / other.backbone).resolve()
        prompt, noise = prompt or other.prompt, other.noise if noise is None else noise
    outline = Backbone.outline(folder, height, width, "init")
    shape, codec, encoder = outline.flow.config, outline.codec.config, folder / "text_encoder"
    check_text_encoder(encoder, shape)
    config = AdaptedConfig(
        backbone=os.path.relpath(folder.resolve(), out.resolve()),
        fingerprint=fingerprint(folder),
        codec=codec,
        noise=shape.noise if noise is None else noise,
        prompt=prompt,
    )
    longest = 1 + (config.chunk - 1) * codec.time
    if not 1 + codec.time <= clip <= longest:
        raise ValueError(
            f"clip: expected {1 + codec.time} to {longest} frames, a step of {codec.time} after the first and a chunk of "
            f"{config.chunk} latent frames, got {clip}."
        )
    before = read_world(out, AdaptedConfig)[0] if (out / CONFIG).exists() else config
    if replace(before, backbone=config.backbone) != config:  # wherever it lies
        raise ValueError(f"resume: expected what the run in {out} began with, {before}, got {config}.")
    latent_frames = 1 + (clip - 1) // codec.time
    Backbone.check(folder, height, width, device, latent_frames, trained=batch)
    texts = [format_prompt(text, config.noise, height, width, round(episodes.fps or FPS)) for text in (prompt, "")]
    states = load_text_encoder(encoder, shape.txt_size, device)(texts)
    backbone = Backbone.load(folder, height, width, device, latent_frames)
    model = AdaptedModel(config, episodes.action_space, backbone).to(device)
    model.text.copy_(states[:1])
    model.unconditional.copy_(states[1:])
    return model
