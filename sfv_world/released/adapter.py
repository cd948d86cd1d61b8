"""The control adapter of a released model: separate keys and values beside every layer of a deep block that stays as it is.

Control tokens are those of `control.encoder`; the layers' own queries attend to those of their frame (`layers.Controls`).
An untrained adapter changes nothing, bit for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sfv_world.layers import Controls, Told


class ControlAdapter(nn.Module):
    """Keys, values and zero gates for `depth` layers of `width` channels, in float32 whatever the layers compute in."""

    def __init__(self, width: int, depth: int, control_width: int):
        super().__init__()
        self.layers = nn.ModuleList(Controls(width, control_width) for _ in range(depth))

    def told(self, controls: Float[Tensor, "b t k c"], text: int = 0) -> Sequence[Told]:
        """What it adds to the attention of every layer.

        Args:
            controls: control tokens of what led to each frame.
            text: slots before those of the frames, of the text, which is told of no control.
        """
        return [partial(_add, cast(Controls, layer), controls, text) for layer in self.layers]


def _add(
    layer: Controls, controls: Float[Tensor, "b t k c"], text: int, q: Float[Tensor, "b h slots d"]
) -> Float[Tensor, "b slots w"]:
    frames = controls.shape[1]
    own = rearrange(q[:, :, text:], "b h (t l) d -> (b t) h l d", t=frames).to(controls.dtype)
    out = rearrange(layer(own, rearrange(controls, "b t k c -> (b t) k c")), "(b t) l w -> b (t l) w", t=frames)
    return F.pad(out, (0, 0, text, 0)).to(q.dtype)
