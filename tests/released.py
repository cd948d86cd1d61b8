"""Tiny models of the released layout: two that the reference tensors are of, and one for laws."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file
from tiny import normal, randomised

from sfv_world.released import ReleasedConfig, ReleasedFlow, load_released
from sfv_world.released.model import FlowBlock

REFERENCE = Path(__file__).parent / "reference"
VIDEO, IMAGE = REFERENCE / "starflow_v_tiny", REFERENCE / "starflow_tiny"

TINY = ReleasedConfig(
    in_channels=2, channels=32, layers_per_block=(1, 1, 2), pt_seq_len=3, txt_size=3, txt_dim=5, patch_size=2, head_dim=16,
    top_block_channels=48, shallow_block_local=True, learnable_self_denoiser=True, temporal_causal=1, denoiser_window=1,
)  # fmt: skip


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def count_caches(monkeypatch, block):
    """A list that gets, whenever a cache is made for a block, how many of its caches there are then."""
    made, counts, new_cache = [], [], FlowBlock.new_cache

    def counted(self, *sizes):
        cache = new_cache(self, *sizes)
        if self is block:
            made.append(weakref.ref(cache.keys[0]))
            counts.append(sum(keys() is not None for keys in made))
        return cache

    monkeypatch.setattr(FlowBlock, "new_cache", counted)
    return counts


def load_reference(path):
    """A reference model with its tensors: latents with a time axis, and tokens."""
    tensors = load_file(path / "tensors.safetensors")
    flow = load_released(path / "checkpoint.pth")

    def latents(name):
        return tensors[name] if path == VIDEO else tensors[name][:, None]

    grid = tuple(tensors["x"].shape[-2:])
    guidance = json.loads((path / "config.json").read_text())["guidance"]
    return SimpleNamespace(
        flow=flow, tensors=tensors, latents=latents, grid=grid, guidance=guidance, text=tensors["text"],
        x=flow.tokens(latents("x")), noise=flow.tokens(latents("noise")),
    )  # fmt: skip


def tiny_released(layers, columns=3, scale=0.1):
    """A tiny model in float64 and two videos of 4 frames of 1 x `columns` tokens."""
    flow = randomised(ReleasedFlow(replace(TINY, layers_per_block=layers)), scale=scale).double().eval()
    tokens = flow.tokens(normal(2, 4, 2, 2, 2 * columns, dtype=torch.float64))
    text = normal(2, 3, 5, seed=1, dtype=torch.float64)
    return SimpleNamespace(flow=flow, tokens=tokens, text=text, grid=(1, columns))
