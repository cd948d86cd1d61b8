"""Keys and values of a whole sequence: the full attention of the released layout, decoded piece by piece."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cache_size(layers: int, width: int, slots: int, itemsize: int) -> int:
    """Bytes of the keys and values of a sequence of `slots` slots."""
    return 2 * layers * width * slots * itemsize


@dataclass
class SequenceCache:
    """Preallocated keys and values of a causal Transformer; the first `length` slots are known.

    A value that is passed in and out of decoding. Slots after `length` are rewritten until `length` moves past them. It is most
    of what a row takes, so each layer's is a tensor of its own: `keep` and `join` hold no more than one of them twice.
    """

    keys: list[Float[Tensor, "rows heads slots head_dim"]]
    """Of each layer."""
    values: list[Float[Tensor, "rows heads slots head_dim"]]
    """Of each layer."""
    length: int = 0

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.keys[0])

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return sum(x.nbytes for x in (*self.keys, *self.values))

    def known(
        self,
    ) -> tuple[Float[Tensor, "layers rows heads n head_dim"], Float[Tensor, "layers rows heads n head_dim"]]:
        """Copies of the keys and values of the known slots."""
        keys, values = (torch.stack([x[:, :, : self.length] for x in layers]) for layers in (self.keys, self.values))
        return keys, values

    def fill(
        self, keys: Float[Tensor, "layers rows heads n head_dim"], values: Float[Tensor, "layers rows heads n head_dim"]
    ) -> None:
        """Makes these the known slots."""
        self.length = keys.shape[3]
        for mine, given in ((self.keys, keys), (self.values, values)):
            for layer, x in zip(mine, given, strict=True):
                layer[:, :, : self.length] = x

    def select(self, rows: Int[Tensor, "n"]) -> "SequenceCache":
        """A copy of the given rows (selected, repeated, reordered)."""
        return SequenceCache([x[rows] for x in self.keys], [x[rows] for x in self.values], self.length)

    def keep(self, rows: Int[Tensor, "n"]) -> None:
        """Keeps the given rows alone."""
        for layers in (self.keys, self.values):
            for index in range(len(layers)):
                layers[index] = layers[index][rows]

    def join(self, others: list["SequenceCache"], copies: int) -> None:
        """Takes in the rows of others with as many known slots, each `copies` times; uses them up."""
        together = (self, *others)
        for mine, *theirs in ([cache.keys for cache in together], [cache.values for cache in together]):
            for index, first in enumerate(mine):
                parts = [x.unflatten(0, (copies, -1)) for x in (first, *(layers[index] for layers in theirs))]
                mine[index] = torch.cat(parts, dim=1).flatten(0, 1)
                for layers in theirs:
                    layers[index] = first.new_empty(0, *first.shape[1:])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Writes keys and values of the slots that follow the known ones; each query sees all up to itself."""
        end = self.length + k.shape[2]
        keys, values = self.keys[layer], self.values[layer]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        if self.length == 0:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mask = None
        if k.shape[2] > 1:
            mask = torch.ones(k.shape[2], end, dtype=torch.bool, device=q.device).tril(self.length)
        return F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask)
