"""Transformer layers: rotary positions, attention, MLP.

The lowest room of the house. Parameter names and shapes are those of the released STARFlow layout
(`attention.{norm,qkv,proj}`, `mlp.{norm,main.0,main.2}`), so that loading it is a matter of renaming keys.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Told = Callable[[Tensor], Tensor]
"""What a control adapter that is no part of a layer adds to its attention, by its queries (n h l d)."""


def at_least_float32(x: Float[Tensor, "*b"]) -> Float[Tensor, "*b"]:
    """`x` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FinalNorm(nn.Module):
    """RMSNorm `x * (1 + w)` in at least float32 (the norm before a flow block's output projection)."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return F.rms_norm(at_least_float32(x), (x.shape[-1],), 1 + self.weight, self.eps)


class Rope:
    """Rotary positions over (row, column, time), as the released layout uses them.

    Of the pairs of a head, 3/8 turn with the row, 3/8 with the column and 1/4 with time; each group has its own
    geometric frequencies of base 10000. Angles are computed in float64, so a clock that has run for a billion
    frames is as precise as a new one and never needs rebasing.
    """

    def __init__(self, head_dim: int, rows: int, columns: int):
        if head_dim % 16:
            raise ValueError(f"head_dim must be a multiple of 16 so that rotary pairs split 3:3:2, got {head_dim}")
        space, time = 3 * head_dim // 16, head_dim // 8
        self.time_frequencies = 10000.0 ** (-torch.arange(time, dtype=torch.float64) / time)
        frequencies = 10000.0 ** (-torch.arange(space, dtype=torch.float64) / space)
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        angles = torch.cat([position.flatten()[:, None] * frequencies for position in (row, column)], dim=-1)
        self.space = _turn(angles)

    def __call__(self, times: Int[Tensor, "t"], slots: slice = slice(None)) -> Float[Tensor, "t l two p"]:
        """The cosines and sines of every frame time and slot, on the device of `times`."""
        if self.space.device != times.device:  # they stay where they are used: a copy to a device makes the host wait
            self.move_to(times.device)
        space = self.space[slots].expand(len(times), -1, -1, -1)
        time = _turn(times.double()[:, None, None] * self.time_frequencies)
        return torch.cat([space, time.expand(-1, space.shape[1], -1, -1)], dim=-1)

    def move_to(self, device: torch.device) -> None:
        """Moves the tables that it keeps."""
        self.space, self.time_frequencies = (x.to(device) for x in (self.space, self.time_frequencies))


def _turn(angles: Float[Tensor, "*b p"]) -> Float[Tensor, "*b two p"]:
    return torch.stack([angles.cos(), angles.sin()], dim=-2).float()


def rotate(x: Float[Tensor, "*b l d"], turn: Float[Tensor, "*c #l two p"]) -> Float[Tensor, "*b l d"]:
    """Rotates interleaved pairs (x_0, x_1), (x_2, x_3), ... of the last dimension by the given cosines and sines."""
    pairs = torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))
    cos, sin = turn.to(pairs.real.dtype).unbind(-2)
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Bool[Tensor, "..."] | None = None) -> Tensor:
    """Scaled dot-product attention over (..., length, head_dim); `mask` is True where a key is visible."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@contextmanager
def attention_without_plans() -> Iterator[None]:
    """Attention by any kernels but those of cuDNN, which torch prefers in bfloat16 on Hopper and Blackwell.

    They are planned anew for every shape, in each thread, which takes tenths of a second. Decoding meets new shapes all the time:
    at every block of tokens of a video, for every number of rows that begin anew or are not settled yet.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


class Controls(nn.Module):
    """The zero-gated control adapter of one attention layer: control tokens are separate keys and values.

    The layer's own queries attend to the control tokens of their frame through the adapter's projections; the
    answer is added to the attention's output times a gate per channel that starts at zero. An untrained adapter
    therefore changes nothing, bit for bit (zero-init attention of LLaMA-Adapter, arXiv 2303.16199).
    """

    def __init__(self, width: int, control_width: int):
        super().__init__()
        self.kv = nn.Linear(control_width, 2 * width)
        self.gate = nn.Parameter(torch.zeros(width))

    def forward(self, q: Float[Tensor, "n h l d"], controls: Float[Tensor, "n k c"]) -> Float[Tensor, "n l hd"]:
        k, v = rearrange(self.kv(controls), "n k (two h d) -> two n h k d", two=2, h=q.shape[1])
        return self.gate * rearrange(attend(q, k, v), "n h l d -> n l (h d)")


class Attention(nn.Module):
    """Pre-norm multi-head attention; how keys are found (a window, a cache) is the caller's `attend`."""

    def __init__(self, width: int, head_dim: int, control_width: int | None = None):
        super().__init__()
        if width % head_dim:
            raise ValueError(f"width must be a multiple of head_dim, got width {width} and head_dim {head_dim}")
        self.head_dim = head_dim
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.controls = Controls(width, control_width) if control_width else None

    def forward(
        self,
        x: Float[Tensor, "n l d"],
        turn: Float[Tensor, "#n 1 l two p"],
        attend: Attend,
        controls: Float[Tensor, "n k c"] | Told | None,
    ) -> Float[Tensor, "n l d"]:
        qkv = self.qkv(self.norm(x))
        qkv = rearrange(qkv, "n l (three h d) -> three n h l d", three=3, d=self.head_dim)
        (turned_q, k), (q, _, v) = rotate(qkv[:2], turn), qkv
        out = rearrange(attend(turned_q, k, v), "n h l d -> n l (h d)")
        if callable(controls):
            out = out + controls(q)
        elif self.controls is not None and controls is not None:
            out = out + self.controls(q, controls)
        return self.proj(out)


class MLP(nn.Module):
    """Pre-norm MLP with the exact-erf GELU and four times the width inside."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.main = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "n l d"]) -> Float[Tensor, "n l d"]:
        return self.main(self.norm(x))


class Layer(nn.Module):
    """One residual Transformer layer: attention, then MLP."""

    def __init__(self, width: int, head_dim: int, control_width: int | None = None):
        super().__init__()
        self.attention = Attention(width, head_dim, control_width)
        self.mlp = MLP(width)

    def forward(
        self,
        x: Float[Tensor, "n l d"],
        turn: Float[Tensor, "#n 1 l two p"],
        attend: Attend,
        controls: Float[Tensor, "n k c"] | Told | None = None,
    ) -> Float[Tensor, "n l d"]:
        x = x + self.attention(x, turn, attend, controls)
        return x + self.mlp(x)
