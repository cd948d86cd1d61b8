"""What callers give: errors whose advice, taken, mends what was wrong."""

from typing import Any

import cv2
import numpy as np
import pytest
import torch

from sfv_world.given import given_frames

SHAPE = (16, 24, 3)
FRAMES = np.random.default_rng(0).integers(256, size=(2, 5, *SHAPE), dtype=np.uint8)
GREY = np.repeat(FRAMES[..., :1], 3, -1)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("frames", "lead", "advice", "mended"),
    [
        (np.moveaxis(FRAMES, -1, -3), "(B, K", "np.moveaxis(frames, -3, -1)", FRAMES),
        (np.moveaxis(FRAMES[0], -1, -3), "(K", "np.moveaxis(frames, -3, -1)", FRAMES[0]),
        (GREY[..., :1], "(B, K", "np.repeat(frames, 3, -1)", GREY),
        (GREY[..., 0], "(B, K", "np.repeat(frames[..., None], 3, -1)", GREY),
        (FRAMES[0], "(B, K", "frames[None]", FRAMES[:1]),
        (FRAMES[0, 0], "(B, K", "frames[None, None]", FRAMES[:1, :1]),
        (FRAMES[0, 0], "(K", "frames[None]", FRAMES[0, :1]),
    ],
)
def test_advice_mends_frames(frames: np.ndarray, lead: str, advice: str, mended: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"frames: expected .*, 16, 24, 3\) uint8.*, got shape \(.*\)\. ") as error:
        given_frames(frames, lead, SHAPE, CPU)
    said = str(error.value)
    assert said.endswith(f": {advice}.") and "INTER_AREA" not in said
    found = given_frames(eval(advice, {"frames": frames, "np": np}), lead, SHAPE, CPU)
    np.testing.assert_array_equal(found, mended)


@pytest.mark.parametrize("size", [(8, 24, 3), (16, 16, 3), (3, 40, 3)])
def test_frames_of_another_size_are_to_be_resized(size: tuple[int, ...]) -> None:
    frames = np.zeros((2, 5, *size), np.uint8)
    with pytest.raises(ValueError, match="Resize with cv2.INTER_AREA"):
        given_frames(frames, "(B, K", SHAPE, CPU)
    resized = [[cv2.resize(frame, (24, 16), interpolation=cv2.INTER_AREA) for frame in row] for row in frames]
    assert given_frames(resized, "(B, K", SHAPE, CPU).shape == (2, 5, *SHAPE)


@pytest.mark.parametrize("frames", [FRAMES[:, :0], FRAMES[None], FRAMES[0, 0, 0], np.uint8(0), FRAMES[..., :2]])
def test_where_no_advice_is_sure_none_is_given(frames: Any) -> None:
    with pytest.raises(ValueError, match=r"uint8.*, got shape \(.*\)\.$"):
        given_frames(frames, "(B, K", SHAPE, CPU)


def test_frames_of_several_a_step_miss_their_batch() -> None:
    with pytest.raises(
        ValueError, match=r"got shape \(5, 16, 24, 3\)\. Add what is missing in front: frames\[None\]\."
    ):
        given_frames(FRAMES[0], "(B", (5, *SHAPE), CPU)
