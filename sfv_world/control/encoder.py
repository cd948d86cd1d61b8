"""The control encoder: action vectors to control tokens, with a learned 'no action'."""

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn


class ControlEncoder(nn.Module):
    """Turns the action that led to a frame into that frame's control tokens.

    Where no action is known (a video's first frame, and at random in training) the tokens are learned ones, so that
    p(x | no action) exists beside p(x | action).
    """

    def __init__(self, action_size: int, width: int, tokens: int = 4):
        super().__init__()
        self.action_size, self.tokens = action_size, tokens
        self.project = nn.Sequential(nn.Linear(action_size, width), nn.SiLU(), nn.Linear(width, tokens * width))
        self.absent = nn.Parameter(torch.randn(tokens, width))

    def forward(
        self, actions: Float[Tensor, "*b n"], known: Bool[Tensor, "*b"] | None = None
    ) -> Float[Tensor, "*b k c"]:
        """Control tokens of action vectors; those not `known` get the tokens of no action."""
        tokens = rearrange(self.project(actions), "... (k c) -> ... k c", k=self.tokens)
        return tokens if known is None else torch.where(known[..., None, None], tokens, self.absent)
