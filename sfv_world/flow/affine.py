"""The affine map of an autoregressive flow: z = (x - mu) / sigma, with mu and sigma predicted by a Transformer.

TARFlow (arXiv 2412.06329) with the softplus parameterisation and soft clipping of STARFlow (arXiv 2506.06276).
At least float32, whatever the Transformer computes in.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sfv_world.layers import at_least_float32

SOFT_CLIP = 4.0
SOFTPLUS_ONE = 0.541324854612918  # softplus(SOFTPLUS_ONE) = 1


def soft_clip(x: Tensor) -> Tensor:
    """Smoothly within [-4, 4], and close to `x` near zero."""
    return SOFT_CLIP * torch.tanh(x / SOFT_CLIP)


class Fields(NamedTuple):
    """Mean and scale of every channel of every token: what a Transformer says of tokens it has not seen."""

    mu: Float[Tensor, "*b l c"]
    sigma: Float[Tensor, "*b l c"]

    @classmethod
    def from_parameters(cls, parameters: Float[Tensor, "*b l two_c"], clip_mean: bool = False) -> "Fields":
        """Fields from a Transformer's output (a, b): sigma = softplus(clip(a) + 0.5413), mu = b, or clip(b) as STARFlow has it.

        The soft clip 4 tanh(. / 4) keeps sigma in [0.031, 4.55]; zeros give the identity map. Latents of a large VAE rarely pass 4,
        but what is bright and rare in a game is 10 to 25 standard deviations away: no clipped mean can follow it.
        """
        a, b = at_least_float32(parameters).chunk(2, dim=-1)
        return cls(mu=soft_clip(b) if clip_mean else b, sigma=F.softplus(soft_clip(a) + SOFTPLUS_ONE))

    def normalise(self, x: Float[Tensor, "*b l c"]) -> tuple[Float[Tensor, "*b l c"], Float[Tensor, "*b l"]]:
        """x -> (z, log|det dz/dx| of every token)."""
        return (x - self.mu) / self.sigma, -self.sigma.log().sum(-1)

    def denormalise(self, z: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b l c"]:
        """z -> x, the inverse of `normalise`."""
        return self.mu + self.sigma * z


def guide(conditional: Fields, unconditional: Fields, weight: float) -> Fields:
    """Fields moved away from the unconditional ones: the product p_c^(1+w) / p_u^w of two normals, kept proper.

    With s = min(sigma_c / sigma_u, 1)^2 and d = 1 + w - w s: sigma = sigma_c / sqrt(d), mu = ((1 + w) mu_c - w s mu_u) / d.
    """
    share = (conditional.sigma / unconditional.sigma).clamp(max=1).square()
    precision = 1 + weight - weight * share
    mu = ((1 + weight) * conditional.mu - weight * share * unconditional.mu) / precision
    return Fields(mu, conditional.sigma / precision.sqrt())


def standard_normal_log_prob(z: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b l"]:
    """Log-density of every token under N(0, I), in nats, with its constant."""
    return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)
