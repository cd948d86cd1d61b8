"""STARFlow and STARFlow-V in the released layout: shallow blocks in a frame, a deep block over all of the video, a denoiser.

The equations of STARFlow-V (arXiv 2511.20462) as everywhere in this package. Unlike in our own worlds, the deep block attends to
all frames since the first and reads a text prefix, and rotary positions are scaled to the grid. An image is a video of one
frame. Parameter names are the released ones. In lower precision only the layers change: projections, norms and the
affine algebra stay in float32.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sfv_world.flow.affine import Fields
from sfv_world.flow.model import Encoding
from sfv_world.flow.shallow import Stage
from sfv_world.layers import Attend, FinalNorm, Layer, Told
from sfv_world.released.cache import SequenceCache
from sfv_world.released.config import DENOISER_LAYERS, ReleasedConfig
from sfv_world.released.positions import slot_turns

TWEEDIE_SCALE = 0.3
"""What the released denoiser's output is multiplied by: it predicts (sigma^2 / 0.3) times the gradient of -log p."""


def attend_causally(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of every slot to itself and those before it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def attend_to_frames(
    q: Tensor, k: Tensor, v: Tensor, *, text: int, frames: int, ahead: int, window: int
) -> Float[Tensor, "n h l d"]:
    """The denoiser's attention, without a mask as large as the video squared.

    A query in frame q sees frames q + ahead - 1 - window .. q + ahead - 1 and all text; text sees what frame 0 sees.
    With `ahead` 0 everything sees everything.
    """
    if ahead == 0:
        return F.scaled_dot_product_attention(q, k, v)
    slots = (q.shape[2] - text) // frames
    out = []
    for frame in range(frames):
        first, last = max(0, frame + ahead - 1 - window), min(frames, frame + ahead)
        own = slice(0 if frame == 0 else text + frame * slots, text + (frame + 1) * slots)
        keys, values = (
            torch.cat([x[:, :, :text], x[:, :, text + first * slots : text + last * slots]], dim=2) for x in (k, v)
        )
        out.append(F.scaled_dot_product_attention(q[:, :, own], keys, values))
    return torch.cat(out, dim=2)


class Transformer(nn.Module):
    """Tokens, after a prefix of text if it reads any, to features."""

    def __init__(self, channels: int, out_channels: int, width: int, depth: int, head_dim: int, text_width: int | None):
        super().__init__()
        self.head_dim = head_dim
        self.proj_in = nn.Linear(channels, width)
        self.proj_txt = nn.Linear(text_width, width) if text_width else None
        self.attn_blocks = nn.ModuleList(Layer(width, head_dim) for _ in range(depth))
        self.final_norm = FinalNorm(width)
        self.proj_out = nn.Linear(width, out_channels)

    def embed(
        self, slots: Float[Tensor, "n l c"], text: Float[Tensor, "n k e"] | None = None
    ) -> Float[Tensor, "n all_slots w"]:
        """The residual stream that the first layer reads; where there is text, it comes first."""
        x = self.proj_in(slots)
        if self.proj_txt is not None and text is not None:
            x = torch.cat([self.proj_txt(text), x], dim=1)
        return x.to(self.layer_weight.dtype)

    @property
    def layer_weight(self) -> Float[Tensor, "w w"]:
        """A weight of the layers, for their dtype, device and width."""
        return cast(Layer, self.attn_blocks[0]).attention.proj.weight

    def features(
        self,
        x: Float[Tensor, "n l w"],
        turn: Float[Tensor, "l two p"],
        attend: Attend | SequenceCache,
        told: Sequence[Told] = (),
    ) -> Float[Tensor, "n l w"]:
        """The layers, with one way of attending for all or a cache that takes their keys and values.

        `told` is what an adapter adds to the attention of each layer; nothing if it is empty.
        """
        for index, layer in enumerate(self.attn_blocks):
            how = partial(attend.attend, index) if isinstance(attend, SequenceCache) else attend
            x = layer(x, turn[None, None], how, told[index] if told else None)
        if isinstance(attend, SequenceCache):
            attend.length += x.shape[1]
        return self.final_norm(x)

    def project(self, features: Float[Tensor, "n l w"]) -> Float[Tensor, "n l c"]:
        """The output projection, in at least float32 whatever the layers compute in."""
        with torch.autocast(features.device.type, enabled=False):
            return self.proj_out(features)


class FlowBlock(Transformer):
    """One affine autoregressive block: slot i carries token i-1, slot 0 a learned one."""

    def __init__(self, channels: int, width: int, depth: int, head_dim: int, text_width: int | None = None):
        super().__init__(channels, 2 * channels, width, depth, head_dim, text_width)
        self.sos_embed = nn.Parameter(0.02 * torch.randn(1, 1, channels))

    def forward(
        self,
        tokens: Float[Tensor, "n l c"],
        turn: Float[Tensor, "all_slots two p"],
        text: Float[Tensor, "n k e"] | None = None,
        told: Sequence[Told] = (),
    ) -> tuple[Float[Tensor, "n l w"], Fields]:
        """Features and fields of all tokens in parallel; `turn` covers the text as well."""
        slots = torch.cat([self.sos_embed.expand(len(tokens), -1, -1), tokens[:, :-1]], dim=1)
        features = self.features(self.embed(slots, text), turn, attend_causally, told)[:, -tokens.shape[1] :]
        return features, self.fields(features)

    def fields(self, features: Float[Tensor, "n l w"]) -> Fields:
        """Mean and scale of the tokens that the slots predict."""
        return Fields.from_parameters(self.project(features), clip_mean=True)

    def new_cache(self, rows: int, slots: int) -> SequenceCache:
        """An empty cache for `rows` sequences of `slots` slots, text included."""
        weight = self.layer_weight
        shape = (rows, len(weight) // self.head_dim, slots, self.head_dim)
        keys, values = (
            [torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in self.attn_blocks] for _ in range(2)
        )
        return SequenceCache(keys, values)


class ReleasedFlow(nn.Module):
    """A released model: exact log-likelihood of noised tokens, and the denoiser; `sampling` draws from it.

    Example:
        >>> import torch
        >>> flow = ReleasedFlow(ReleasedConfig(4, 64, (1, 1), pt_seq_len=2, txt_size=3, txt_dim=8))
        >>> encoding = flow(flow.tokens(torch.zeros(1, 1, 4, 2, 2)), torch.zeros(1, 3, 8), grid=(2, 2))
        >>> encoding.log_prob.shape
        torch.Size([1, 1, 4])
    """

    def __init__(self, config: ReleasedConfig):
        super().__init__()
        self.config = config
        channels, *shallow = config.token_channels, *config.layers_per_block[:-1]
        blocks = [FlowBlock(channels, config.channels, depth, config.head_dim) for depth in shallow]
        deep = config.deep_width, config.layers_per_block[-1]
        self.blocks = nn.ModuleList([*blocks, FlowBlock(channels, *deep, config.head_dim, config.txt_dim)])
        self.learnable_self_denoiser = None
        if config.learnable_self_denoiser:
            text_width = config.txt_dim if config.conditional_denoiser else None
            self.learnable_self_denoiser = Transformer(
                channels, channels, config.channels, DENOISER_LAYERS, config.head_dim, text_width
            )

    def block(self, index: int) -> FlowBlock:
        """Block `index`: shallow ones from 0 on, in the order they read tokens; the deep one is the last, -1."""
        return cast(FlowBlock, self.blocks[index])

    def tokens(self, latents: Float[Tensor, "b t c h w"]) -> Float[Tensor, "b t l d"]:
        """Codec latents -> tokens of every frame, in raster order."""
        p = self.config.patch_size
        return rearrange(latents, "b t c (h p1) (w p2) -> b t (h w) (p1 p2 c)", p1=p, p2=p)

    def latents(self, tokens: Float[Tensor, "b t l d"], grid: tuple[int, int]) -> Float[Tensor, "b t c hp wp"]:
        """Tokens -> codec latents, the inverse of `tokens`."""
        p, (h, w) = self.config.patch_size, grid
        return rearrange(tokens, "b t (h w) (p1 p2 c) -> b t c (h p1) (w p2)", h=h, w=w, p1=p, p2=p)

    def orient(self, index: int, tokens: Tensor) -> Tensor:
        """Tokens (..., l, c) in block `index`'s direction, or back; the first block reads a frame from its end."""
        blocks = len(self.blocks)
        flips = blocks % 2 if index % blocks == blocks - 1 else (index + 1) % 2
        return tokens.flip(-2) if flips else tokens

    def turn(self, frames: int, grid: tuple[int, int], text: bool, device: torch.device) -> Float[Tensor, "l two p"]:
        """Rotary cosines and sines of a video's slots, after those of the text."""
        config = self.config
        return slot_turns(frames, grid, config.pt_seq_len, config.txt_size if text else 0, config.head_dim, device)

    def within_frames(
        self, tokens: Float[Tensor, "n l c"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "n l c"], list[Stage]]:
        """The shallow blocks, frame by frame: tokens -> latents u, and what every block read, in its own direction."""
        x, stages, turn = tokens, [], self.turn(1, grid, False, tokens.device)
        for index in range(len(self.blocks) - 1):
            x = self.orient(index, x)
            _, fields = self.block(index)(x, turn)
            stages.append(Stage(x, fields))
            x = self.orient(index, fields.normalise(x)[0])
        return x, stages

    def log_det(self, stages: list[Stage], tokens: Float[Tensor, "*b l c"]) -> Float[Tensor, "*b l"]:
        """log|det| of the first blocks together, which read `tokens`, by token in raster order."""
        total = torch.zeros_like(tokens[..., 0])
        for index, stage in enumerate(stages):
            part = stage.fields.normalise(stage.tokens)[1]
            total = total + self.orient(index, part.reshape(*total.shape, 1))[..., 0]
        return total

    def stages(
        self,
        tokens: Float[Tensor, "b t l d"],
        text: Float[Tensor, "b k e"],
        grid: tuple[int, int],
        told: Sequence[Told] = (),
    ) -> tuple[list[Stage], Float[Tensor, "b l2 w"]]:
        """What every block read, in its own direction, and its fields: a frame a row, or for the deep block a video."""
        self.check(tokens, text, grid)
        frames = tokens.shape[1]
        x, stages = self.within_frames(rearrange(tokens, "b t l c -> (b t) l c"), grid)
        x = self.orient(-1, rearrange(x, "(b t) l c -> b t l c", t=frames))
        x = rearrange(x, "b t l c -> b (t l) c")
        features, fields = self.block(-1)(x, self.turn(frames, grid, True, x.device), text, told)
        return [*stages, Stage(x, fields)], features

    def forward(
        self,
        tokens: Float[Tensor, "b t l d"],
        text: Float[Tensor, "b k e"],
        grid: tuple[int, int],
        told: Sequence[Told] = (),
    ) -> Encoding:
        """tokens -> noise, log-determinant and deep features, by token in raster order.

        Args:
            tokens: noised tokens of videos, from their first frame on; images are videos of one frame.
            text: states of the text encoder.
            grid: rows and columns of tokens in a frame.
            told: what a control adapter adds to the attention of each layer of the deep block; nothing if it is empty.

        Raises:
            ValueError: if shapes do not fit the configuration or each other.
        """
        stages, features = self.stages(tokens, text, grid, told)
        log_det = self.log_det(stages, tokens)
        read, fields = stages[-1]
        deep = (fields.normalise(read)[0], read, features, fields.mu, fields.sigma)
        noise, latents, features, mu, sigma = (self.orient(-1, x.reshape(*tokens.shape[:3], -1)) for x in deep)
        return Encoding(noise, log_det, latents, features, Fields(mu, sigma))

    def denoise(
        self, tokens: Float[Tensor, "b t l d"], text: Float[Tensor, "b k e"], grid: tuple[int, int]
    ) -> Float[Tensor, "b t l d"]:
        """The denoiser's estimate of the tokens without their noise, x - 0.3 s(x)."""
        return tokens - TWEEDIE_SCALE * self.score(tokens, text, grid)

    def score(
        self, tokens: Float[Tensor, "b t l d"], text: Float[Tensor, "b k e"], grid: tuple[int, int]
    ) -> Float[Tensor, "b t l d"]:
        """What the denoiser predicts, (sigma^2 / 0.3) times the gradient of -log p at the noised tokens.

        Raises:
            ValueError: if the model has no denoiser, or shapes do not fit.
        """
        self.check(tokens, text, grid)
        denoiser, config, frames = self.learnable_self_denoiser, self.config, tokens.shape[1]
        if denoiser is None:
            raise ValueError("This model has no denoiser: its configuration says learnable_self_denoiser = False.")
        prefix = config.txt_size if config.conditional_denoiser else 0
        x = denoiser.embed(rearrange(tokens, "b t l c -> b (t l) c"), text if prefix else None)
        ahead, window = config.temporal_causal, config.denoiser_window
        attend = partial(attend_to_frames, text=prefix, frames=frames, ahead=ahead, window=window)
        features = denoiser.features(x, self.turn(frames, grid, bool(prefix), x.device), attend)
        return rearrange(denoiser.project(features[:, prefix:]), "b (t l) c -> b t l c", t=frames)

    def check(self, tokens: Tensor, text: Tensor, grid: tuple[int, int]) -> None:
        """Raises ValueError if tokens, text and grid do not fit the configuration or each other."""
        config, size = self.config, grid[0] * grid[1]
        if tokens.ndim != 4 or tokens.shape[2:] != (size, config.token_channels):
            expected = f"(batch, frames, {size}, {config.token_channels})"
            raise ValueError(f"tokens must have the shape {expected} for grid {grid}, got {tuple(tokens.shape)}")
        if tokens.shape[1] != 1 and not config.shallow_block_local:
            raise ValueError(
                f"tokens must be of one frame, since this is a model of images; got {tokens.shape[1]} frames"
            )
        if text.shape != (len(tokens), config.txt_size, config.txt_dim):
            shape = (len(tokens), config.txt_size, config.txt_dim)
            raise ValueError(f"text must have the shape {shape}, got {tuple(text.shape)}: pad the encoder's states")
