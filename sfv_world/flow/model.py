"""The video flow: shallow blocks within each frame, one deep flow over frames, and the exact likelihood of both.

STARFlow-V (arXiv 2511.20462): p(x) = prod_n p_D(u_n | u_<n, a_<n) |det J_S(x_n)|, u_n = f_S(x_n). Two deep flows share one
interface: `autoregressive`, the paper's, over latents u in token order; and `frame-parallel`, which predicts the fields of
all tokens of frame n from the tokens x_<n and the actions in one pass. Its features also condition the shallow blocks,
which then carry what is left to say within the frame. Both are exact.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sfv_world.flow.affine import Fields, standard_normal_log_prob
from sfv_world.flow.cache import FrameCache
from sfv_world.flow.shallow import BandFlow, RasterFlow, Stage
from sfv_world.flow.spline import MOST_BINS
from sfv_world.flow.transformer import SlotTransformer, TransformerConfig

DeepKind = Literal["frame-parallel", "autoregressive"]


@dataclass(frozen=True)
class FlowConfig:
    """Shape of a video flow."""

    channels: int
    """Channels of a token."""
    grid: tuple[int, int]
    """Rows and columns of tokens in a frame."""
    deep: TransformerConfig
    """The flow over frames."""
    shallow: TransformerConfig
    """Each block of the flow within a frame."""
    shallow_blocks: int = 2
    """Autoregressive blocks within a frame, in alternating directions, where there are no bands."""
    bands: tuple[int, ...] = ()
    """Channels of each band of a shallow flow that goes from coarse to fine instead; all together those of a token."""
    groups: int = 1
    """Groups of tokens that the coarsest band is drawn in, one after the other: 1, 2 or 4."""
    bins: tuple[int, ...] = ()
    """Bins of the curves that the coarsest bands are drawn with, one after the other; the other bands' maps are affine."""
    kind: DeepKind = "frame-parallel"
    """Which deep flow."""
    control_width: int = 64
    """Channels of a control token."""
    draft_width: int = 0
    """Width of the network that drafts latents for the autoregressive deep flow's fixed point; 0: none."""

    def __post_init__(self) -> None:
        if self.shallow.window != 1:
            raise ValueError(f"shallow.window must be 1 (a shallow block sees one frame), got {self.shallow.window}")
        if self.kind not in ("frame-parallel", "autoregressive"):
            raise ValueError(f"kind must be 'frame-parallel' or 'autoregressive', got {self.kind!r}")
        if self.draft_width and self.kind != "autoregressive":
            raise ValueError(f"draft_width must be 0 for a deep flow of one pass, got {self.draft_width}")
        if self.bands and (min(self.bands) < 1 or sum(self.bands) != self.channels):
            raise ValueError(f"bands must be positive and add up to the {self.channels} channels, got {self.bands}")
        if self.groups not in (1, 2, 4) or (self.groups > 1 and not self.bands):
            raise ValueError(f"groups must be 1, 2 or 4, and 1 without bands, got {self.groups} and bands {self.bands}")

        if len(self.bins) > len(self.bands) or any(not 2 <= n <= MOST_BINS for n in self.bins):
            raise ValueError(
                f"bins must be 2 to {MOST_BINS}, at most one for each of the bands {self.bands}, got {self.bins}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of a frame, L."""
        return self.grid[0] * self.grid[1]


class Encoding(NamedTuple):
    """What a forward pass of the flow says of a video."""

    noise: Float[Tensor, "b t l c"]
    """z, standard normal under the model."""
    log_det: Float[Tensor, "b t l"]
    """log|det dz/dx|, by token in raster order, all blocks together."""
    latents: Float[Tensor, "b t l c"]
    """u, after the shallow flow."""
    features: Float[Tensor, "b t l w"]
    """The deep flow's last features."""
    fields: Fields
    """The deep flow's mean and scale of u."""

    @property
    def log_prob(self) -> Float[Tensor, "b t l"]:
        """log p of every token given all before it, in nats, with every constant; float32."""
        return standard_normal_log_prob(self.noise) + self.log_det


class VideoFlow(nn.Module):
    """The normalizing flow over videos of noised tokens, conditioned on control tokens."""

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.deep = SlotTransformer(
            config.deep,
            channels=config.channels,
            grid=config.grid,
            order="frame" if config.kind == "frame-parallel" else "token",
            control_width=config.control_width,
        )
        condition = config.deep.width if config.kind == "frame-parallel" else None
        self.shallow: RasterFlow | BandFlow
        if config.bands:
            self.shallow = BandFlow(config.shallow, config.grid, config.bands, config.groups, config.bins, condition)
        else:
            self.shallow = RasterFlow(config.shallow, config.grid, config.channels, config.shallow_blocks, condition)

        self.drafter: SlotTransformer | None = None
        if config.draft_width:
            self.drafter = SlotTransformer(
                TransformerConfig(config.draft_width, depth=1, head_dim=config.deep.head_dim),
                channels=4 * config.channels,
                outputs=config.channels,
                start=False,
                grid=config.grid,
                order="frame",
                control_width=config.control_width,
            )

    def forward(
        self,
        tokens: Float[Tensor, "b t l c"],
        controls: Float[Tensor, "b t k d"] | None = None,
        cache: FrameCache | None = None,
        told: Float[Tensor, "b t l c"] | None = None,
    ) -> Encoding:
        """tokens -> noise, log-determinant and features, all frames in parallel.

        Args:
            tokens: noised tokens of videos that begin here.
            controls: control tokens of what led *to* each frame; without them the deep flow runs as if it had no adapter.
            cache: a fresh cache whose clock stands at the end of the video; filled with the deep flow's keys and values.
            told: what a frame-parallel deep flow is told of the past in place of `tokens`; the likelihood is then given that.
        """
        frames = tokens.shape[1]
        flat = rearrange(tokens, "b t l c -> (b t) l c")
        if self.config.kind == "frame-parallel":
            past = self.deep.shift(tokens if told is None else told)
            features = self.deep.features(past, controls, cache=cache)
            latents, log_det, _ = self.shallow(flat, rearrange(features, "b t l w -> (b t) l w"))
            latents = rearrange(latents, "(b t) l c -> b t l c", t=frames)
        else:
            latents, log_det, _ = self.shallow(flat)
            latents = rearrange(latents, "(b t) l c -> b t l c", t=frames)
            features = self.deep.features(self.deep.shift(latents), controls, cache=cache)
        fields = self.deep.fields(features)
        noise, deep_log_det = fields.normalise(latents)
        log_det = rearrange(log_det, "(b t) l -> b t l", t=frames) + deep_log_det
        return Encoding(noise, log_det, latents, features, fields)

    @torch.no_grad()
    def redraw(self, encoding: Encoding, noise: Float[Tensor, "b t l c"]) -> Float[Tensor, "b t l c"]:
        """Every frame of a video that was read drawn anew, given the real ones before it: frame-parallel flows in bands only."""
        flat = [rearrange(x, "b t l c -> (b t) l c") for x in (encoding.fields.denormalise(noise), encoding.features)]
        return rearrange(self.shallow.inverse(*flat), "(b t) l c -> b t l c", t=noise.shape[1])

    def draft(
        self, noise: Float[Tensor, "n l c"], previous: Stage, controls: Float[Tensor, "n k d"] | None
    ) -> Float[Tensor, "n l c"]:
        """A guess at the latents of a frame with the given noise, from what the deep flow did to the frame before.

        An affine correction, one small pass, of last frame's fields applied to the noise; untrained, it is just that.
        """
        assert self.drafter is not None, "whoever asks for a learned draft has checked that there is one"
        seen = torch.cat([noise, previous.tokens, *previous.fields], dim=-1)
        features = self.drafter.features(seen[:, None], None if controls is None else controls[:, None])
        return self.drafter.fields(features[:, 0]).denormalise(previous.fields.denormalise(noise))

    def draft_error(self, encoding: Encoding, controls: Float[Tensor, "b t k d"] | None) -> Float[Tensor, "b s l"]:
        """How far drafts of all frames but the first are from their latents: mean log(1 + d^2), d in units of the noise.

        The logarithm keeps a few wild tokens from outweighing the rest. The pairs (z, u) to learn from are exact and come with
        every forward pass; the flow itself is not moved by them.
        """
        flat = [x.detach() for x in (encoding.noise, encoding.latents, *encoding.fields)]
        before, after = (
            [rearrange(x[:, cut], "b t l c -> (b t) l c") for x in flat] for cut in (np.s_[:-1], np.s_[1:])
        )
        told = None if controls is None else rearrange(controls[:, 1:].detach(), "b t k d -> (b t) k d")
        guess = self.draft(after[0], Stage(before[1], Fields(*before[2:])), told)
        error = ((guess - after[1]) / after[3]).square().log1p().mean(-1)
        return rearrange(error, "(b t) l -> b t l", b=len(encoding.noise))

    @torch.no_grad()
    def inverse(
        self, noise: Float[Tensor, "b t l c"], controls: Float[Tensor, "b t k d"] | None = None
    ) -> Float[Tensor, "b t l c"]:
        """noise -> tokens: the inverse of `forward`, frame by frame and token by token.

        The definition that `decoding`, which does the same in few passes, is held against.
        """
        cache, frames = self.deep.new_cache(len(noise)), []
        carried = self.deep.sos_embed.expand(len(noise), -1, -1)
        if self.config.kind == "frame-parallel":
            carried = carried.expand(-1, self.config.tokens, -1)
        for n in range(noise.shape[1]):
            z, control = noise[:, n], None if controls is None else controls[:, n]
            if self.config.kind == "frame-parallel":
                features = self.deep.decode(carried, cache, controls=control)
                latents = self.deep.fields(features).denormalise(z)
                carried = tokens = self.shallow.inverse(latents, features)
            else:
                latents = self.deep.inverse(z, cache, carried, control)
                tokens, carried = self.shallow.inverse(latents), latents[:, -1:]
            cache.advance()
            frames.append(tokens)
        return torch.stack(frames, dim=1)

    def log_prob(self, tokens: Float[Tensor, "b t l c"], controls: Float[Tensor, "b t k d"] | None = None) -> Tensor:
        """log p(x_n | x_<n, a_<n) of every frame, (b, t), in nats."""
        return self(tokens, controls).log_prob.sum(-1)
