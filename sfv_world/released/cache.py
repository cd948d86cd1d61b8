"""Keys and values of a whole sequence: the full attention of the released layout, decoded piece by piece."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass
class SequenceCache:
    """Preallocated keys and values of a causal Transformer; the first `length` slots are known.

    A value that is passed in and out of decoding. Slots after `length` are rewritten until `length` moves past them.
    """

    keys: Float[Tensor, "layers rows heads slots head_dim"]
    values: Float[Tensor, "layers rows heads slots head_dim"]
    length: int = 0

    def empty(self, rows: int) -> "SequenceCache":
        """One like it of so many rows, in which nothing is known."""
        layers, _, *shape = self.keys.shape
        keys, values = (x.new_empty(layers, rows, *shape) for x in (self.keys, self.values))
        return SequenceCache(keys, values)

    def fill(
        self, keys: Float[Tensor, "layers rows heads n head_dim"], values: Float[Tensor, "layers rows heads n head_dim"]
    ) -> None:
        """Makes these the known slots."""
        self.length = keys.shape[3]
        self.keys[..., : self.length, :], self.values[..., : self.length, :] = keys, values

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes keys and values of the slots that follow the known ones; each query sees all up to itself."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        if self.length == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = None
        if k.shape[2] > 1:
            mask = torch.ones(k.shape[2], end, dtype=torch.bool, device=q.device).tril(self.length)
        return F.scaled_dot_product_attention(q, self.keys[layer, :, :, :end], self.values[layer, :, :, :end], mask)
