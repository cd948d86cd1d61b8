"""Tiny released models of videos with a VAE that compresses time or does not, and worlds on them whose every weight matters."""

import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from gymnasium import spaces
from released import TINY
from test_text import LENGTH, save_encoder
from test_vae import wan_vae
from tiny import randomised

from sfv_world.checkpoint import STARTS, save_model, save_tensors
from sfv_world.control.spaces import action_size
from sfv_world.released import ReleasedFlow
from sfv_world.released.adapted import AdaptedConfig, AdaptedModel
from sfv_world.released.backbone import Backbone, fingerprint
from sfv_world.released.convert import ConvertConfig, convert

SHAPE = replace(TINY, in_channels=4, patch_size=1, txt_size=LENGTH, txt_dim=16)
HEIGHT, WIDTH = 16, 24
DISCRETE = spaces.Discrete(3)


def make_backbone(folder: Path, time: int = 4, denoiser: bool = True) -> Path:
    """A folder with all the parts of a released model of videos, whose VAE compresses time by 4 or 1."""
    shape = replace(SHAPE, learnable_self_denoiser=denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(randomised(ReleasedFlow(shape), scale=0.05).state_dict(), folder / "tiny.pth")
        (folder / "tiny.json").write_text(json.dumps(shape.__dict__))
        backbone = convert(ConvertConfig(folder / "tiny.pth", folder / "backbone", str(folder / "tiny.json")))
        wan_vae(temperal_downsample=[False, time > 1, time > 1]).save_pretrained(backbone / "vae")
        save_encoder(backbone / "text_encoder")
    return backbone


def make_model(backbone: Path, scale: float = 0.1, action_space: spaces.Space = DISCRETE, **changes) -> AdaptedModel:
    """A model of 16 x 24 frames in chunks of 4; at scale 0 with an adapter as it is before training."""
    whole = Backbone.load(backbone, HEIGHT, WIDTH, "cpu", frames=4)
    known = {"chunk": 4, "context": 2, "control_width": 6, "control_tokens": 2, "noise": 0.5} | changes
    config = AdaptedConfig(str(backbone), fingerprint(backbone), whole.codec.config, **known)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AdaptedModel(config, action_space, whole)
    for seed, text in enumerate((model.text, model.unconditional)):
        text.normal_(generator=torch.Generator().manual_seed(seed))
    if scale:
        randomised(model, scale=scale)
    with torch.no_grad():  # rewards of a few units, and few frames end an episode
        bias = model.heads.mlp[-1].bias
        bias[0] -= 4
        bias[1:] -= model.heads.bins.abs().log1p().repeat(2) * 3
    return model.eval()


def make_world(folder: Path, model: AdaptedModel, backbone: Path) -> Path:
    """Saves a world with three start sequences of two steps after their first frame."""
    config = replace(model.config, backbone=os.path.relpath(backbone, folder))
    model.config = config
    save_model(folder, model, {"data": {"fps": 8.0}})
    generator, frames = torch.Generator().manual_seed(0), 1 + 2 * model.codec.time
    starts = torch.randint(256, (3, frames, HEIGHT, WIDTH, 3), generator=generator).byte()
    actions = torch.rand(3, frames, action_size(model.action_space), generator=generator)
    save_tensors(folder / STARTS, {"frames": starts, "actions": actions})
    return folder
