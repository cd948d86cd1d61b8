"""A monotone curve for every channel: what an affine map cannot say of a value that is either here or there.

Rational-quadratic splines (Neural Spline Flows, arXiv 1906.04032): invertible in closed form, the identity outside [-REACH, REACH].
At least float32, whatever the Transformer computes in.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sfv_world.flow.affine import Fields
from sfv_world.layers import at_least_float32

REACH = 5.0
LEAST = 1e-3
"""Smallest width and height of a bin, as a part of [-REACH, REACH], and smallest slope at a knot."""
MOST_BINS = 100
"""Of a curve: their smallest widths are then a tenth of the whole."""
SLOPE_ONE = math.log(math.expm1(1 - LEAST))  # LEAST + softplus(SLOPE_ONE) = 1


class Spline(NamedTuple):
    """Knots of a curve z = f(v) of every channel of every token, from corner to corner of [-REACH, REACH]^2."""

    v: Float[Tensor, "*b l c knots"]
    z: Float[Tensor, "*b l c knots"]
    slope: Float[Tensor, "*b l c knots"]

    @staticmethod
    def parameters(bins: int) -> int:
        """Parameters of a channel's curve."""
        return 3 * bins - 1

    @classmethod
    def from_parameters(cls, parameters: Float[Tensor, "*b l c n"]) -> "Spline":
        """Curves from a network's output, n = 3 x bins - 1 a channel; zeros give the identity map."""
        bins = (parameters.shape[-1] + 1) // 3
        widths, heights, slopes = at_least_float32(parameters).split([bins, bins, bins - 1], dim=-1)
        slope = F.pad(LEAST + F.softplus(slopes + SLOPE_ONE), (1, 1), value=1.0)
        return cls(_knots(widths), _knots(heights), slope)

    def forward(self, v: Float[Tensor, "*b l c"]) -> tuple[Float[Tensor, "*b l c"], Float[Tensor, "*b l c"]]:
        """v -> (z, log dz/dv)."""
        low, width, bottom, height, before, after = self._bin(self.v, v)
        inside = v.abs() < REACH
        at = ((v - low) / width).clamp(0, 1)
        steep = height / width
        bow = at * (1 - at)
        below = steep + (before + after - 2 * steep) * bow
        z = bottom + height * (steep * at.square() + before * bow) / below
        rise = after * at.square() + 2 * steep * bow + before * (1 - at).square()
        log_slope = 2 * (steep.log() - below.log()) + rise.log()
        return torch.where(inside, z, v), torch.where(inside, log_slope, 0.0)

    def inverse(self, z: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b l c"]:
        """z -> v."""
        low, width, bottom, height, before, after = self._bin(self.z, z)
        inside = z.abs() < REACH
        up = (z - bottom).clamp(min=0).minimum(height)
        steep = height / width
        bend = up * (before + after - 2 * steep)
        a, b, c = height * (steep - before) + bend, height * before - bend, -steep * up
        at = 2 * c / (-b - (b.square() - 4 * a * c).clamp(min=0).sqrt())
        return torch.where(inside, low + at * width, z)

    def _bin(self, knots: Tensor, x: Tensor) -> list[Tensor]:
        """Of the bin that x lies in: its corner and extent in v and in z, and the slopes at its ends."""
        index: Int[Tensor, "*b l c 1"] = (x[..., None] >= knots[..., 1:-1]).sum(-1, keepdim=True)
        v, v_end, z, z_end, before, after = (
            x.gather(-1, at)[..., 0] for x in (self.v, self.z, self.slope) for at in (index, index + 1)
        )
        return [v, v_end - v, z, z_end - z, before, after]


class Curve(NamedTuple):
    """An affine map and then a spline: fields whose noise is normal only after it was bent."""

    fields: Fields
    spline: Spline

    def normalise(self, x: Float[Tensor, "*b l c"]) -> tuple[Float[Tensor, "*b l c"], Float[Tensor, "*b l"]]:
        """x -> (z, log|det dz/dx| of every token)."""
        v, log_det = self.fields.normalise(x)
        z, log_slope = self.spline.forward(v)
        return z, log_det + log_slope.sum(-1)

    def denormalise(self, z: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b l c"]:
        """z -> x, the inverse of `normalise`."""
        return self.fields.denormalise(self.spline.inverse(z))


def _knots(sizes: Float[Tensor, "*b bins"]) -> Float[Tensor, "*b knots"]:
    """Edges of bins of [-REACH, REACH] with the given sizes before a softmax."""
    bins = sizes.shape[-1]
    shares = LEAST + (1 - LEAST * bins) * sizes.softmax(-1)
    inner = REACH * (2 * shares.cumsum(-1)[..., :-1] - 1)
    return torch.cat([F.pad(inner, (1, 0), value=-REACH), torch.full_like(inner[..., :1], REACH)], dim=-1)
