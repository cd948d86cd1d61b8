"""Controls: actions of any space become the vectors that Gymnasium's flattening gives, or an error that says why."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, create_empty_array
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import elsewhere, normal

from sfv_world.control.encoder import ControlEncoder
from sfv_world.control.spaces import action_size, flatten_actions

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)

simple_spaces = st.one_of(
    st.builds(spaces.Discrete, st.integers(1, 5), start=st.integers(-3, 3)),
    st.builds(lambda nvec, start: spaces.MultiDiscrete(nvec, start=[start] * len(nvec)),
              st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(-2, 2)),
    st.builds(lambda a, b, c, d: spaces.MultiDiscrete([[a, b], [c, d]]), *[st.integers(1, 3)] * 4),
    st.builds(spaces.MultiBinary, st.sampled_from([1, 3, [2, 2]])),
    st.builds(lambda shape: spaces.Box(-1, 1, shape), st.sampled_from([(), (2,), (2, 3)])),
)  # fmt: skip
nested_spaces = st.recursive(
    simple_spaces,
    lambda inner: st.one_of(
        st.builds(spaces.Tuple, st.lists(inner, min_size=1, max_size=3)),
        st.builds(spaces.Dict, st.dictionaries(st.sampled_from("cab"), inner, min_size=1)),
    ),
    max_leaves=4,
)


def take(tree: Any, index: tuple[int, ...]) -> Any:
    """One action out of a batch of them."""
    if isinstance(tree, dict):
        return {key: take(value, index) for key, value in tree.items()}
    return tuple(take(part, index) for part in tree) if isinstance(tree, tuple) else tree[index]


@given(space=nested_spaces, batch=st.sampled_from([(1,), (3,), (2, 3)]), seed=st.integers(0, 1000))
@law(max_examples=60)
def test_flattening_is_gymnasiums(space: spaces.Space[Any], batch: tuple[int, ...], seed: int) -> None:
    """Boxes from -1 to 1 are scaled to themselves, so that all spaces here can be compared."""
    batched = space
    for size in reversed(batch):
        batched = batch_space(batched, size)
    batched.seed(seed)
    actions = batched.sample()
    vectors = flatten_actions(space, actions, batch)
    assert vectors.shape == (*batch, action_size(space)) and vectors.dtype == np.float32
    assert action_size(space) == spaces.flatdim(space)
    for index in np.ndindex(*batch):
        expected = spaces.flatten(space, take(actions, index)).astype(np.float32)
        np.testing.assert_allclose(vectors[index], expected, atol=1e-6)


@given(space=nested_spaces)
@law(max_examples=15)
def test_no_actions_make_no_vectors(space: spaces.Space[Any]) -> None:
    nothing = create_empty_array(space, 0, np.zeros)
    assert flatten_actions(space, nothing, (0,)).shape == (0, action_size(space))


def test_lists_and_order_of_keys_do_not_matter() -> None:
    space = spaces.Dict(move=spaces.Discrete(3), look=spaces.Box(-2, 2, (2,)))
    expected = flatten_actions(space, {"look": np.array([[0.5, -1]]), "move": np.array([2])}, (1,))
    np.testing.assert_array_equal(flatten_actions(space, {"move": [2], "look": [[0.5, -1]]}, (1,)), expected)
    pair = spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3)))
    np.testing.assert_array_equal(flatten_actions(pair, [[1], [0]], (1,)), [[0, 1, 1, 0, 0]])


def test_tensors_are_copied_to_the_host() -> None:
    space = spaces.Tuple((spaces.Box(-2, 2, (2,)), spaces.Discrete(3)))
    expected = flatten_actions(space, (np.array([[0.5, -1]]), np.array([2])), (1,))
    learned = torch.tensor([[0.5, -1]], requires_grad=True)
    for box, number in ((learned, torch.tensor([2])), (elsewhere([[0.5, -1]]), elsewhere([2]))):
        np.testing.assert_array_equal(flatten_actions(space, (box, number), (1,)), expected)
    with pytest.raises(ValueError, match="expected integers for Discrete.*got dtype float32"):
        flatten_actions(space.spaces[1], elsewhere([2.0]), (1,))


# Boxes ---------------------------------------------------------------------------------------------------------------


@given(low=st.floats(-1e6, 1e6, width=32), size=st.floats(0.125, 1e6, width=32), where=st.floats(0, 1))
@law(max_examples=30)
def test_a_bounded_box_is_scaled_from_minus_one_to_one(low: float, size: float, where: float) -> None:
    space = spaces.Box(low, low + size, (1,))
    low, high = float(space.low[0]), float(space.high[0])
    value = np.clip(np.float32(low + where * (high - low)), space.low, space.high)
    scaled = flatten_actions(space, [value], (1,))
    assert np.abs(scaled).max() <= 1
    np.testing.assert_allclose(scaled, [2 * (value.astype(np.float64) - low) / (high - low) - 1], atol=1e-5)
    np.testing.assert_allclose(flatten_actions(space, [[low], [high]], (2,)), [[-1], [1]], atol=1e-6)


@pytest.mark.parametrize(
    ("space", "value", "expected"),
    [
        (spaces.Box(-0.7, 0.7, (1,)), [0.7], [1]),  # above the float32 that is nearest
        (spaces.Box(3, 3, (1,)), [3], [-1]),
        (spaces.Box(-np.inf, np.inf, (3,)), [-(np.e - 1), 0, np.e**5 - 1], [-1, 0, 5]),
        (spaces.Box(0, np.inf, (1,)), [np.e - 1], [1]),
        (spaces.Box(np.array([-1, -np.inf]), np.array([3, 1]), dtype=np.float64), [1, -(np.e - 1)], [0, -1]),
        (spaces.Box(0, 255, (2,), np.uint8), np.array([0, 255], np.uint8), [-1, 1]),
        (spaces.Box(-128, 127, (2,), np.int8), np.array([-128, 127], np.int8), [-1, 1]),
        (spaces.Box(0, 1, (2,), np.uint8), np.array([False, True]), [-1, 1]),
        (spaces.Box(-np.inf, np.inf, (1,), np.int64), [3], [np.log(4)]),
        (spaces.Box(np.finfo(np.float32).min, np.finfo(np.float32).max, (1,)), [0], [0]),
    ],
)
def test_boxes_of_all_kinds(space: spaces.Box, value: Any, expected: list[float]) -> None:
    np.testing.assert_allclose(flatten_actions(space, np.asarray(value)[None], (1,)), [expected], atol=1e-6)


# Errors --------------------------------------------------------------------------------------------------------------

DISCRETE, BOX = spaces.Discrete(3, start=2), spaces.Box(-1, 1, (2,))
TREE = spaces.Dict(key=DISCRETE, mouse=spaces.Tuple((BOX, spaces.MultiBinary(2))))


@pytest.mark.parametrize(
    ("space", "actions", "message"),
    [
        (DISCRETE, [1], r"actions: expected values inside Discrete\(3, start=2\), got values from 1 to 1"),
        (DISCRETE, [5], "got values from 5 to 5"),
        (DISCRETE, np.array([2**63], np.uint64), "got values from"),
        (DISCRETE, [2.0], r"expected integers for Discrete\(3, start=2\), got dtype float64"),
        (DISCRETE, 2, r"expected shape \(1,\) for Discrete\(3, start=2\), got \(\)"),
        (DISCRETE, None, r"expected shape \(1,\)"),
        (spaces.MultiDiscrete([2, 3]), [[1, 3]], "expected values inside MultiDiscrete"),
        (spaces.MultiDiscrete([2, 3]), [[-1, 0]], "got values from -1 to 0"),
        (spaces.MultiDiscrete([[2, 3], [2, 2]]), [[1, 1, 1, 1]], r"expected shape \(1, 2, 2\)"),
        (spaces.MultiBinary(2), [[0, 2]], "expected values inside MultiBinary"),
        (BOX, [[0, 1.5]], "expected values inside Box.*got values from 0.0 to 1.5"),
        (BOX, [[0, np.nan]], "expected finite numbers"),
        (spaces.Box(-np.inf, np.inf, (1,)), [[np.inf]], "expected finite numbers"),
        (spaces.Box(-np.inf, np.inf, (1,), np.float64), [[1e300]], "expected finite numbers"),
        (BOX, [["left", "up"]], "expected numbers for Box.*got dtype <U4"),
        (BOX, [0, 1], r"expected shape \(1, 2\) for Box.*got \(2,\)"),
        (TREE, [2], r"expected a dict with the keys \['key', 'mouse'\], got list"),
        (TREE, {"key": [2], 7: 0}, r"expected a dict with the keys \['key', 'mouse'\], got \['7', 'key'\]"),
        (TREE, {"key": [2], "mouse": ([[0, 0]],)}, r"actions\['mouse'\]: expected a tuple of 2 parts"),
        (TREE, {"key": [2], "mouse": 3}, r"actions\['mouse'\]: expected a tuple of 2 parts, got 3"),
        (TREE, {"key": [2], "mouse": ([[0, 2]], [[0, 1]])}, r"actions\['mouse'\]\[0\]: expected values inside Box"),
        (spaces.Text(3), "abc", "Text.* is not a space of actions|expected shape"),
        (spaces.Sequence(DISCRETE), [2], "is not a space of actions|expected shape"),
    ],
)
def test_wrong_actions_are_refused(space: spaces.Space[Any], actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten_actions(space, actions, (1,))


@pytest.mark.parametrize("space", [spaces.Text(3), spaces.Dict(a=spaces.Sequence(DISCRETE))])
def test_other_spaces_have_no_size(space: spaces.Space[Any]) -> None:
    with pytest.raises(ValueError, match=r"expected Discrete, .*got (Text|Sequence).*Wrap the environment"):
        action_size(space)


# The encoder ---------------------------------------------------------------------------------------------------------


def test_unknown_actions_have_tokens_of_their_own() -> None:
    encoder = ControlEncoder(action_size=3, width=8, tokens=2)
    actions, known = normal(2, 3, 3), torch.tensor([[False, True, True], [True, False, True]])
    tokens = encoder(actions, known)
    assert tokens.shape == (2, 3, 2, 8)
    exact(tokens[~known], encoder.absent.expand(2, -1, -1))
    exact(tokens[known], encoder(actions)[known])
    changed = torch.where(known[..., None], actions, actions + 1)
    exact(encoder(changed, known), tokens)
    assert not torch.equal(encoder(actions + 1, known)[known], tokens[known])
    close(encoder(actions[1, 2]), tokens[1, 2])
