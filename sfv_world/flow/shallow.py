"""Shallow flows: what is left to say within one frame, once the deep flow has said what it knows of it.

Two kinds share one interface. `RasterFlow` is STARFlow-V's (arXiv 2511.20462): affine autoregressive blocks, token by token, in
alternating directions; its inverse is a fixed point (`decoding.solver`). `BandFlow` goes from coarse to fine: the channels of
all tokens are cut into bands, and each band's fields follow from the coarser ones of the whole frame. It is exact after one
pass a band, however uncertain the frame is, and what it draws within a patch hangs together (parallel multiscale
autoregression, arXiv 1703.03664, with the affine maps of RealNVP, arXiv 1605.08803).
"""

from collections.abc import Mapping
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sfv_world.flow.affine import Fields
from sfv_world.flow.spline import Curve, Spline
from sfv_world.flow.transformer import SlotTransformer, TransformerConfig


class Stage(NamedTuple):
    """What one affine map of the flow did to one frame: the tokens it read, in its own direction, and its fields."""

    tokens: Float[Tensor, "n l c"]
    fields: Fields

    def tensors(self, name: str) -> dict[str, Tensor]:
        """All of it, by names that begin with `name`."""
        return {f"{name}.tokens": self.tokens, f"{name}.mu": self.fields.mu, f"{name}.sigma": self.fields.sigma}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], name: str) -> "Stage":
        """The one whose `tensors` are among these."""
        return cls(tensors[f"{name}.tokens"], Fields(tensors[f"{name}.mu"], tensors[f"{name}.sigma"]))


class RasterFlow(nn.Module):
    """Affine autoregressive blocks within one frame, in alternating directions, the first one reversed."""

    def __init__(
        self, config: TransformerConfig, grid: tuple[int, int], channels: int, blocks: int, condition_width: int | None
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            SlotTransformer(config, channels=channels, grid=grid, order="token", condition_width=condition_width)
            for _ in range(blocks)
        )

    def block(self, index: int) -> SlotTransformer:
        """Block `index`, the first one to read tokens being 0."""
        return cast(SlotTransformer, self.blocks[index])

    @staticmethod
    def orient(index: int, x: Tensor) -> Tensor:
        """`x` (..., slots, channels) in block `index`'s direction, or back: even blocks read a frame from its end."""
        return x.flip(-2) if index % 2 == 0 else x

    def forward(
        self, tokens: Float[Tensor, "n l c"], condition: Float[Tensor, "n l e"] | None = None
    ) -> tuple[Float[Tensor, "n l c"], Float[Tensor, "n l"], list[Stage]]:
        """tokens -> (latents, log|det| by token, what each block saw), for frames that know nothing of each other."""
        total, stages = tokens.new_zeros(tokens.shape[:-1]), []
        for index in range(len(self.blocks)):
            block = self.block(index)
            x, c = self.orient(index, tokens), None if condition is None else self.orient(index, condition)
            features = block.features(block.shift(x[:, None]), condition=None if c is None else c[:, None])
            fields = block.fields(features[:, 0])
            z, log_det = fields.normalise(x)
            stages.append(Stage(x, fields))
            tokens, total = self.orient(index, z), total + self.orient(index, log_det[..., None])[..., 0]
        return tokens, total, stages

    def inverse(
        self, latents: Float[Tensor, "n l c"], condition: Float[Tensor, "n l e"] | None = None
    ) -> Float[Tensor, "n l c"]:
        """latents -> tokens, one after the other."""
        for index in reversed(range(len(self.blocks))):
            block = self.block(index)
            z, c = self.orient(index, latents), None if condition is None else self.orient(index, condition)
            start = block.sos_embed.expand(len(z), -1, -1)
            latents = self.orient(index, block.inverse(z, block.new_cache(len(z)), start, condition=c))
        return latents


class BandFlow(nn.Module):
    """Coupling from coarse to fine: the map of a band of channels follows from all coarser bands of the frame.

    Nothing is coarser than the first band. Its tokens are drawn in `groups`, evenly spread over the frame: those of one follow
    from the groups before, by the same Transformer. The first bands' maps are curves of so many `bins`: what acts in a world is
    here or there, and no affine map makes that of normal noise. All others are affine.
    """

    group: Int[Tensor, "l"]
    """Of every token, the group of its first band."""

    def __init__(
        self,
        config: TransformerConfig,
        grid: tuple[int, int],
        bands: tuple[int, ...],
        groups: int,
        bins: tuple[int, ...],
        condition_width: int | None,
    ):
        super().__init__()
        channels = sum(bands)
        self.bands = [slice(end - size, end) for size, end in zip(bands, accumulate(bands), strict=True)]
        self.groups = [groups, *(1 for _ in bands[1:])]
        self.blocks = nn.ModuleList(
            SlotTransformer(
                config, channels=channels, outputs=size, grid=grid, order="frame", condition_width=condition_width
            )
            for size in bands
        )
        self.bends = nn.ModuleList(
            nn.Linear(config.width, size * Spline.parameters(n)) for size, n in zip(bands, bins, strict=False)
        )
        for parameter in self.bends.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("group", spread(grid, groups), persistent=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without what was compiled, which is of this very module: copies compile their own (`World.compiled`)."""
        return {name: value for name, value in super().__getstate__().items() if name != "decode"}

    @property
    def passes(self) -> int:
        """Passes of a Transformer that a frame takes."""
        return sum(self.groups)

    def forward(
        self, tokens: Float[Tensor, "n l c"], condition: Float[Tensor, "n l e"] | None = None
    ) -> tuple[Float[Tensor, "n l c"], Float[Tensor, "n l"], list[Stage]]:
        """tokens -> (latents, log|det| by token, nothing), for frames that know nothing of each other."""
        latents, log_dets = [], []
        for index, band in enumerate(self.bands):
            told = self._tell(index, 0, tokens, condition)
            for group in range(1, self.groups[index]):
                told = self._tell(index, group, tokens, condition, told)
            z, log_det = self._map(index, told).normalise(tokens[..., band])
            latents.append(z)
            log_dets.append(log_det)
        return torch.cat(latents, dim=-1), torch.stack(log_dets).sum(0), []

    def inverse(
        self, latents: Float[Tensor, "n l c"], condition: Float[Tensor, "n l e"] | None = None
    ) -> Float[Tensor, "n l c"]:
        """latents -> tokens, one band after the other."""
        return self._draw(latents, condition)[0]

    def decode(
        self, latents: Float[Tensor, "n l c"], condition: Float[Tensor, "n l e"] | None = None
    ) -> tuple[Float[Tensor, "n l c"], Float[Tensor, "n l c"], Float[Tensor, "n l"]]:
        """latents -> (tokens, their own latents, log|det| by token): the inverse, and what `forward` says of its answer.

        Each band's map is evaluated at the very tokens that are returned, so nothing is left to verify.
        """
        tokens, maps = self._draw(latents, condition)
        found = [map_.normalise(tokens[..., band]) for map_, band in zip(maps, self.bands, strict=True)]
        return tokens, torch.cat([z for z, _ in found], dim=-1), torch.stack([log_det for _, log_det in found]).sum(0)

    def _draw(self, latents: Tensor, condition: Tensor | None) -> tuple[Float[Tensor, "n l c"], list[Fields | Curve]]:
        """Tokens, and the map of each band that they were drawn by."""
        tokens, maps = latents[..., :0], []
        for index, band in enumerate(self.bands):
            told, known = None, tokens
            for group in range(self.groups[index]):
                told = self._tell(index, group, known, condition, told)
                map_ = self._map(index, told)
                known = torch.cat([tokens, map_.denormalise(latents[..., band])], dim=-1)
            tokens = known
            maps.append(map_)
        return tokens, maps

    def _tell(
        self, index: int, group: int, tokens: Tensor, condition: Tensor | None, earlier: Tensor | None = None
    ) -> Float[Tensor, "n l parameters"]:
        """Parameters of a band's map, right for tokens up to a group; `earlier` are those told of the groups before.

        Channels that are not known yet hold the start token's.
        """
        block, band = cast(SlotTransformer, self.blocks[index]), self.bands[index]
        start = block.sos_embed.expand(*tokens.shape[:-1], -1)
        before = (self.group < group)[:, None]
        known = [tokens[..., : band.start]]
        if group:
            known.append(torch.where(before, tokens[..., band], start[..., band]))
        slots = torch.cat([*known, start[..., band.stop if group else band.start :]], dim=-1)
        features = block.alone(slots, condition)
        with torch.autocast(features.device.type, enabled=False):
            told = [block.proj_out(features), *(bend(features) for bend in self.bends[index : index + 1])]
        now = torch.cat(told, dim=-1)
        return now if earlier is None else torch.where(before, earlier, now)

    def _map(self, index: int, parameters: Float[Tensor, "n l parameters"]) -> Fields | Curve:
        """The map of a band."""
        size = self.bands[index].stop - self.bands[index].start
        fields = Fields.from_parameters(parameters[..., : 2 * size])
        if index >= len(self.bends):
            return fields
        return Curve(fields, Spline.from_parameters(parameters[..., 2 * size :].unflatten(-1, (size, -1))))


def spread(grid: tuple[int, int], groups: int) -> Int[Tensor, "l"]:
    """The group of each place: all the same, the two colours of a chessboard, or these cut again into every other row."""
    row, column = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    colour, half = (row + column) % 2, row % 2
    return {1: 0 * colour, 2: colour, 4: 2 * colour + half}[groups].flatten()
