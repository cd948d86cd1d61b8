"""Tiny flows with random weights everywhere, so that nothing is the identity and a law that is broken fails."""

from dataclasses import replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from sfv_world.flow.model import FlowConfig, VideoFlow
from sfv_world.flow.transformer import TransformerConfig

Kind = Literal["frame-parallel", "autoregressive", "bands"]
KINDS: tuple[Kind, ...] = ("frame-parallel", "autoregressive", "bands")
"""Both deep flows with raster blocks (the autoregressive one with a learned draft), and the frame-parallel one with bands (the
first in groups, and of curves)."""
CONTROL_WIDTH = 5

Module = TypeVar("Module", bound=nn.Module)


def randomised(module: Module, seed: int = 0, scale: float = 0.15) -> Module:
    """Moves every parameter, zero-initialised gates and projections too, away from where it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return module


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Elsewhere(Tensor):
    """A tensor that NumPy does not read by itself, as none on a GPU: it is to be copied to the host."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def elsewhere(values: Any) -> Tensor:
    """The values as such a tensor."""
    return torch.as_tensor(values).as_subclass(Elsewhere)


def of_kind(config: FlowConfig, kind: Kind) -> FlowConfig:
    """The same sizes, as a flow of the given kind."""
    if kind == "bands":
        return replace(config, bands=(1, config.channels - 1) if config.channels > 1 else (1,), groups=4, bins=(4,))
    return replace(config, kind=kind, draft_width=config.deep.head_dim if kind == "autoregressive" else 0)


def tiny_flow(
    kind: Kind = "frame-parallel",
    *,
    grid: tuple[int, int] = (2, 2),
    channels: int = 3,
    window: int = 3,
    depth: int = 2,
    blocks: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    scale: float = 0.15,
    curved: bool = True,
) -> VideoFlow:
    """A video flow of width 16 with random weights, in evaluation mode; its bands, if it has any, `curved` or all affine."""
    deep = TransformerConfig(width=16, depth=depth, head_dim=16, window=window)
    shallow = replace(deep, depth=1, window=1)
    config = of_kind(FlowConfig(channels, grid, deep, shallow, blocks, control_width=CONTROL_WIDTH), kind)
    config = config if curved else replace(config, bins=())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        flow = VideoFlow(config)
    return randomised(flow, seed + 1, scale).to(dtype).eval()


def video(flow: VideoFlow, rows: int, frames: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random tokens of videos and control tokens of the actions that led to their frames."""
    config, dtype = flow.config, flow.deep.proj_in.weight.dtype
    tokens = normal(rows, frames, config.tokens, config.channels, seed=seed, dtype=dtype)
    return tokens, normal(rows, frames, 2, config.control_width, seed=seed + 1, dtype=dtype)
