"""The denoiser: clean frames from the noised ones that the flow is a density of.

Flow-score matching (STARFlow-V, arXiv 2511.20462): the network learns the score of the flow itself, whose value is the gradient
that training computes anyway. By Tweedie's formula (Efron, Tweedie's formula and selection bias, 2011), x + sigma^2 times the
score is the mean of the clean frame given the noised ones. The network regresses smoothly over what the raw gradient says with
speckles, and sees one frame ahead at most: the best guess at the score of a whole video from frames up to n+1 is the
score of their own density, so either way it learns the right thing to show.
"""

from typing import NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfv_world.flow.transformer import TransformerConfig
from sfv_world.layers import FinalNorm, Layer, Rope, at_least_float32, attend


class Seen(NamedTuple):
    """A frame as the flow sees it."""

    tokens: Float[Tensor, "n l c"]
    """Noised tokens."""
    features: Float[Tensor, "n l w"]
    """The deep flow's features of their slots: all that the past says of the frame."""


class Denoiser(nn.Module):
    """Predicts sigma times the score of noised frames, each from itself, what the past says of it, and at most the next frame.

    A Transformer within one frame; the next frame lies over it, channel by channel. So it sees exactly one frame ahead, however
    many layers it has. Its answer is an affine map of a linear one, because noise has as many dimensions as a token and
    would not fit through a narrow Transformer: a + b * linear(inputs), with a and b from the Transformer.
    """

    def __init__(self, config: TransformerConfig, *, channels: int, grid: tuple[int, int], features: int):
        super().__init__()
        self.rope = Rope(config.head_dim, *grid)
        self.sizes = [config.width, channels]
        self.here = nn.Linear(channels + features, sum(self.sizes))
        self.ahead = nn.Linear(channels + features, sum(self.sizes))
        self.nothing_ahead = nn.Parameter(torch.zeros(sum(self.sizes)))
        self.place = nn.Parameter(0.02 * torch.randn(grid[0] * grid[1], config.width))
        self.attn_blocks = nn.ModuleList(Layer(config.width, config.head_dim) for _ in range(config.depth))
        self.final_norm = FinalNorm(config.width)
        self.proj_out = nn.Linear(config.width, 2 * channels)
        nn.init.zeros_(self.proj_out.weight)
        with torch.no_grad():  # begins by saying nothing, ready to learn the linear map first
            self.proj_out.bias[:channels], self.proj_out.bias[channels:] = 0, 1
            for linear in (self.here, self.ahead):
                linear.weight[config.width :], linear.bias[config.width :] = 0, 0

    def forward(
        self, frame: Seen, following: Seen | None = None, shown: Bool[Tensor, "n"] | None = None
    ) -> Float[Tensor, "n l c"]:
        """Sigma times the score, in units of the noise: about minus the noise itself.

        Args:
            frame: what to denoise.
            following: the frames after it; none: nothing is seen ahead.
            shown: which of `following` may be seen; none: all of them.
        """
        x = self.here(torch.cat(frame, dim=-1))
        if following is None:
            x = x + self.nothing_ahead
        else:
            ahead = self.ahead(torch.cat(following, dim=-1))
            x = x + (ahead if shown is None else torch.where(shown[:, None, None], ahead, self.nothing_ahead))
        x, linear = x.split(self.sizes, dim=-1)
        x = (x + self.place).to(cast(Layer, self.attn_blocks[0]).attention.proj.weight.dtype)
        turn = self.rope(torch.zeros(1, dtype=torch.long, device=x.device))[:, None]
        for layer in self.attn_blocks:
            x = layer(x, turn, attend)
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = self.proj_out(self.final_norm(x)).chunk(2, dim=-1)
            return shift + scale * at_least_float32(linear)


def video_score(
    denoiser: nn.Module,
    tokens: Float[Tensor, "b t l c"],
    features: Float[Tensor, "b t l w"],
    shown: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t l c"]:
    """What a denoiser says of all frames of videos; `shown`: of which the next may be seen (default: all; the last has none)."""
    b, t = tokens.shape[:2]
    may = torch.ones(b, t, dtype=torch.bool, device=tokens.device) if shown is None else shown.clone()
    may[:, -1] = False
    frame = Seen(*(rearrange(x, "b t l c -> (b t) l c") for x in (tokens, features)))
    following = Seen(*(rearrange(x.roll(-1, dims=1), "b t l c -> (b t) l c") for x in (tokens, features)))
    return rearrange(denoiser(frame, following, may.flatten()), "(b t) l c -> b t l c", b=b)
