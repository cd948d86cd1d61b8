"""The cache of a whole sequence: rows are selected, kept and joined as tensors are, and no more than a layer is held twice."""

import weakref

import pytest
import torch

from sfv_world.released.cache import SequenceCache


class Watched(list):
    """Layers, of which it is counted how many of the first ones are alive whenever one is replaced."""

    def __init__(self, layers):
        super().__init__(layers)
        self.first, self.alive = [weakref.ref(layer) for layer in layers], []

    def __setitem__(self, index, layer):
        super().__setitem__(index, layer)
        self.alive.append(sum(first() is not None for first in self.first))


def cache(rows, seed=0, layers=3):
    generator = torch.Generator().manual_seed(seed)
    keys, values = ([torch.randn(rows, 2, 5, 4, generator=generator) for _ in range(layers)] for _ in range(2))
    return SequenceCache(keys, values, 3)


def test_rows_are_selected_and_stay():
    before = cache(4)
    found = before.select(torch.tensor([2, 0, 2]))
    assert (found.rows, found.length, found.nbytes) == (3, 3, before.nbytes * 3 // 4)
    for mine, theirs in zip(found.known(), before.known(), strict=True):
        assert torch.equal(mine, theirs[:, [2, 0, 2]]) and mine.shape == (3, 3, 2, 3, 4)
    found.keys[0].zero_()
    assert torch.equal(before.keys[0], cache(4).keys[0])


def test_rows_are_kept_layer_by_layer():
    found = cache(4)
    found.keys = Watched(found.keys)
    found.keep(torch.tensor([3, 1]))
    assert all(torch.equal(x, y[:, [3, 1]]) for x, y in zip(found.known(), cache(4).known(), strict=True))
    assert found.keys.alive == [2, 1, 0]


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_are_joined_layer_by_layer(copies):
    """Those of each copy together: the copies of all rows are one after the other."""
    found, other = cache(2 * copies, 1), cache(copies, 2)
    other.values = Watched(other.values)
    found.join([other], copies)
    for mine, one, two in zip(found.known(), cache(2 * copies, 1).known(), cache(copies, 2).known(), strict=True):
        for n in range(copies):
            assert torch.equal(mine[:, 3 * n : 3 * n + 2], one[:, 2 * n : 2 * n + 2])
            assert torch.equal(mine[:, 3 * n + 2], two[:, n])
    assert found.rows == 3 * copies and other.nbytes == 0 and other.values.alive[-1] <= 1


def test_it_is_filled_with_what_is_known():
    found = SequenceCache([torch.zeros(4, 2, 5, 4) for _ in range(3)], [torch.zeros(4, 2, 5, 4) for _ in range(3)])
    found.fill(*cache(4).known())
    assert found.length == 3 and all(torch.equal(x, y) for x, y in zip(found.known(), cache(4).known(), strict=True))
    assert not any(layer[:, :, 3:].any() for layer in (*found.keys, *found.values))
