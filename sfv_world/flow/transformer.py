"""The Transformer behind every flow block: slots of a frame in, fields of that frame's tokens out.

A *slot* (n, i) is the place that predicts token i of frame n. What it reads depends on the order:

- `token` order (STARFlow, arXiv 2506.06276): slot (n, i) carries token i-1 of the frame (slot 0: the last token of
  the frame before) and sees the slots before it, raster-wise. One pass evaluates a frame; inverting is a fixed point.
- `frame` order (the predictor of NTM, arXiv 2605.08078, applied to video): slot (n, i) carries token i of frame n-1 and
  sees all slots of its frame. One pass predicts the whole next frame before any of it is known.

Either way a slot of frame n sees frames n-W+1 .. n, so a parallel pass over a video and a streaming pass with a ring
of W frames compute the same function at any length.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sfv_world.flow.affine import Fields
from sfv_world.flow.cache import FrameCache
from sfv_world.layers import FinalNorm, Layer, Rope, attend, rotate

Order = Literal["token", "frame"]


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one flow block's Transformer."""

    width: int
    """Channels of the residual stream."""
    depth: int
    """Layers."""
    head_dim: int = 32
    """Channels of one attention head, a multiple of 16."""
    window: int = 1
    """Frames a slot sees, its own included."""

    def __post_init__(self) -> None:
        if min(self.width, self.depth, self.window) < 1:
            raise ValueError(
                f"width, depth, window: expected at least 1, got {self.width}, {self.depth}, {self.window}."
            )


class SlotTransformer(nn.Module):
    """A windowed causal Transformer over frames of slots, with its output projection to (a, b) of the fields.

    It reads tokens of `channels` and predicts fields of `outputs` channels, as many if not said. Without a `start` token it
    reads frames as they are.
    """

    sos_embed: nn.Parameter

    def __init__(
        self,
        config: TransformerConfig,
        *,
        channels: int,
        grid: tuple[int, int],
        order: Order,
        outputs: int | None = None,
        start: bool = True,
        control_width: int | None = None,
        condition_width: int | None = None,
    ):
        super().__init__()
        self.config, self.order, self.grid, self.slots = config, order, grid, grid[0] * grid[1]
        self.rope = Rope(config.head_dim, *grid)
        self.register_parameter("sos_embed", nn.Parameter(0.02 * torch.randn(1, 1, channels)) if start else None)
        self.proj_in = nn.Linear(channels, config.width)
        self.proj_condition = nn.Linear(condition_width, config.width) if condition_width else None
        # Frame order has no start token to count from, so its slots know their absolute place.
        self.place = nn.Parameter(0.02 * torch.randn(1, self.slots, config.width)) if order == "frame" else None
        self.attn_blocks = nn.ModuleList(
            Layer(config.width, config.head_dim, control_width) for _ in range(config.depth)
        )
        self.final_norm = FinalNorm(config.width)
        self.proj_out = nn.Linear(config.width, 2 * (outputs or channels))
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def shift(self, tokens: Float[Tensor, "b t l c"]) -> Float[Tensor, "b t l c"]:
        """What every slot carries: the tokens moved one place (token order) or one frame (frame order) on."""
        b, t, l, _ = tokens.shape
        sequence = rearrange(tokens, "b t l c -> b (t l) c")
        start = self.sos_embed.expand(b, 1 if self.order == "token" else l, -1)
        sequence = torch.cat([start, sequence[:, : t * l - start.shape[1]]], dim=1)
        return rearrange(sequence, "b (t l) c -> b t l c", t=t)

    def features(
        self,
        slots: Float[Tensor, "b t l c"],
        controls: Float[Tensor, "b t k d"] | None = None,
        condition: Float[Tensor, "b t l e"] | None = None,
        cache: FrameCache | None = None,
    ) -> Float[Tensor, "b t l w"]:
        """Parallel pass over whole videos that begin here; `cache` (fresh, its clock at the end) takes their keys and values."""
        b, t = slots.shape[:2]
        x, controls = self._embed(rearrange(slots, "b t l c -> (b t) l c"), _fold(condition), _fold(controls))
        first = 0 if cache is None else cache.clock - t
        turn = self.rope(torch.arange(first, first + t, device=x.device)).repeat(b if t > 1 else 1, 1, 1, 1)[:, None]
        mask = self._window_mask(t, x.device)
        for index, layer in enumerate(self.attn_blocks):
            attend_window = partial(self._attend_window, frames=t, mask=mask, cache=cache, index=index)
            x = layer(x, turn, attend_window, controls)
        return rearrange(self.final_norm(x), "(b t) l w -> b t l w", t=t)

    def alone(
        self, slots: Float[Tensor, "b l c"], condition: Float[Tensor, "b l e"] | None = None
    ) -> Float[Tensor, "b l w"]:
        """Pass over frames that know nothing of each other (frame order only)."""
        x, _ = self._embed(slots, condition)
        turn = self.rope(torch.zeros(1, dtype=torch.long, device=x.device))[:, None]
        for layer in self.attn_blocks:
            x = layer(x, turn, attend)
        return self.final_norm(x)

    def decode(
        self,
        slots: Float[Tensor, "b l c"],
        cache: FrameCache,
        at: slice | None = None,
        controls: Float[Tensor, "b k d"] | None = None,
        condition: Float[Tensor, "b l e"] | None = None,
    ) -> Float[Tensor, "b l w"]:
        """Streaming pass over the slots `at` (default: all) of the current frame of `cache`, which takes their keys and values."""
        at = at or slice(0, self.slots)
        x, controls = self._embed(slots, condition, controls, at)
        turn = self.rope(cache.time, at)[:, None]
        mask = cache.mask(at, causal=self.order == "token")
        for index, layer in enumerate(self.attn_blocks):
            x = layer(x, turn, partial(cache.attend, index, at=at, mask=mask), controls)
        return self.final_norm(x)

    def inverse(
        self,
        noise: Float[Tensor, "b l c"],
        cache: FrameCache,
        before: Float[Tensor, "b 1 c"],
        controls: Float[Tensor, "b k d"] | None = None,
        condition: Float[Tensor, "b l e"] | None = None,
    ) -> Float[Tensor, "b l c"]:
        """Noise -> tokens of the current frame of `cache`, one by one (token order only); slot 0 carries `before`."""
        tokens = [before]
        for i in range(self.slots):
            at = slice(i, i + 1)
            features = self.decode(tokens[-1], cache, at, controls, None if condition is None else condition[:, at])
            tokens.append(self.fields(features).denormalise(noise[:, at]))
        return torch.cat(tokens[1:], dim=1)

    def fields(self, features: Float[Tensor, "*b l w"]) -> Fields:
        """Mean and scale of the tokens that the slots predict, in at least float32."""
        with torch.autocast(features.device.type, enabled=False):
            return Fields.from_parameters(self.proj_out(features))

    def new_cache(self, rows: int, clock: int = 0) -> FrameCache:
        """An empty cache for `rows` videos, on this module's device, `clock` frames into its ring's time."""
        config, weight = self.config, self.layer_weight
        heads, keys = config.width // config.head_dim, config.window * self.slots
        shape = (config.depth, rows, heads, keys, config.head_dim)
        visible = torch.zeros(rows, config.window, dtype=torch.bool, device=weight.device)
        return FrameCache(weight.new_zeros(shape), weight.new_zeros(shape), visible, clock)

    def at_clock(self, cache: FrameCache, clock: int) -> FrameCache:
        """A copy of `cache` whose time is shifted to `clock`: keys turned on, ring places moved; the same to rounding."""
        ahead = clock - cache.clock
        turn = self.rope(torch.full((1,), ahead, device=cache.keys.device), slice(0, 1))  # place (0, 0): time alone
        keys = rotate(cache.keys, turn).roll(ahead * cache.slots, dims=3)
        values = cache.values.roll(ahead * cache.slots, dims=3)
        return FrameCache(keys, values, cache.visible.roll(ahead, dims=1), clock)

    @property
    def layer_weight(self) -> Tensor:
        """A weight of the layers, for their dtype and device."""
        return cast(Layer, self.attn_blocks[0]).attention.proj.weight

    def _embed(
        self, slots: Tensor, condition: Tensor | None, controls: Tensor | None = None, at: slice = slice(None)
    ) -> tuple[Tensor, Tensor | None]:
        """The residual stream that the first layer reads, and the controls, in what the layers compute in."""
        x, dtype = self.proj_in(slots), self.layer_weight.dtype
        if self.proj_condition is not None:
            x = x + self.proj_condition(condition)
        if self.place is not None:
            x = x + self.place[:, at]
        return x.to(dtype), None if controls is None else controls.to(dtype)

    def _window_mask(self, frames: int, device: torch.device) -> Bool[Tensor, "t 1 l keys"] | None:
        window = min(self.config.window, frames)
        if window == 1:
            return None
        ahead = torch.arange(frames, device=device)[:, None] - window + 1 + torch.arange(window, device=device)
        mask = (ahead >= 0).repeat_interleave(self.slots, dim=1)[:, None, None, :].repeat(1, 1, self.slots, 1)
        if self.order == "token":
            mask[..., -self.slots :] = torch.ones(self.slots, self.slots, dtype=torch.bool, device=device).tril()
        return mask

    def _attend_window(
        self, q: Tensor, k: Tensor, v: Tensor, *, frames: int, mask: Tensor | None, cache: FrameCache | None, index: int
    ) -> Tensor:
        """Attention of every frame to the window of frames that ends with it; frames are folded into rows."""
        if cache is not None:
            cache.fill(index, *(rearrange(x, "(b t) h l d -> b t h l d", t=frames) for x in (k, v)))
        window = min(self.config.window, frames)
        if mask is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=self.order == "token")
        k, v = (_windows(x, frames, window) for x in (k, v))
        return attend(q, k, v, mask.repeat(len(q) // frames, 1, 1, 1))


def _windows(x: Float[Tensor, "bt h l d"], frames: int, window: int) -> Float[Tensor, "bt h wl d"]:
    """The last `window` frames of every frame, oldest first; frames before the video are zeros."""
    x = rearrange(x, "(b t) h l d -> b t h l d", t=frames)
    x = F.pad(x, (0, 0, 0, 0, 0, 0, window - 1, 0)).unfold(1, window, 1)
    return rearrange(x, "b t h l d w -> (b t) h (w l) d")


def _fold(x: Tensor | None) -> Tensor | None:
    return None if x is None else rearrange(x, "b t l c -> (b t) l c")
