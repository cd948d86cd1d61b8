"""The pixel codec: an invertible, orthonormal transform with its scale, and cells that frames fall back into."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import normal
from torch import Tensor
from torch.autograd.functional import jacobian

from sfv_world.codec.pixels import PixelCodec, PixelCodecConfig, coarse_to_fine, cosine_matrix

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
seeds = st.integers(0, 10_000)


def codec(height: int = 4, width: int = 6, patch: int = 2, cosine: bool = True) -> PixelCodec:
    """A codec with a different scale for every channel."""
    module = PixelCodec(PixelCodecConfig(height, width, patch, cosine))
    module.scale.copy_(torch.linspace(0.2, 3, module.config.channels))
    return module


def random_frames(*shape: int, seed: int = 0) -> Tensor:
    """Frames of random colours."""
    return torch.randint(256, (*shape, 3), generator=torch.Generator().manual_seed(seed)).byte()


@given(
    rows=st.integers(1, 3), columns=st.integers(1, 3), patch=st.sampled_from([1, 2, 3, 8]), cosine=st.booleans(),
    batch=st.sampled_from([(), (2,), (2, 3)]), seed=seeds,
)  # fmt: skip
@law(max_examples=20)
def test_decode_inverts_encode(
    rows: int, columns: int, patch: int, cosine: bool, batch: tuple[int, ...], seed: int
) -> None:
    module = codec(rows * patch, columns * patch, patch, cosine)
    pixels = normal(*batch, rows * patch, columns * patch, 3, seed=seed)
    tokens = module.encode(pixels)
    assert tokens.shape == (*batch, rows * columns, 3 * patch**2) and module.config.grid == (rows, columns)
    close(module.decode(tokens), pixels)
    close(module.encode(module.decode(tokens)), tokens)
    frames = random_frames(*batch, rows * patch, columns * patch, seed=seed)
    exact(module.frames(module.decode(module.encode(module.signal(frames)))), frames)


@pytest.mark.parametrize("cosine", [True, False])
def test_log_det_is_that_of_the_jacobian(cosine: bool) -> None:
    module = codec(cosine=cosine).double()
    matrix = jacobian(module.encode, normal(4, 6, 3, dtype=torch.float64)).reshape(72, 72)
    close(torch.linalg.slogdet(matrix).logabsdet, module.log_det, rtol=0, atol=1e-5)


@given(uniform=st.floats(0, 1, exclude_max=True, width=32))
@law(max_examples=50)
def test_every_value_falls_back_into_its_cell(uniform: float) -> None:
    module = PixelCodec(PixelCodecConfig(16, 16))
    frames = torch.arange(256).byte().view(16, 16, 1).expand(-1, -1, 3)
    for given_uniform in (uniform, torch.full((16, 16, 3), uniform)):
        pixels = module.signal(frames, given_uniform)
        assert -1 <= pixels.min() and pixels.max() < 1
        exact(module.frames(pixels), frames)


def test_pixels_outside_are_clipped() -> None:
    pixels = torch.tensor([-2.0, -1.001, 1.0, 7.0]).view(2, 2, 1).expand(-1, -1, 3)
    assert codec(2, 2).frames(pixels)[..., 0].flatten().tolist() == [0, 0, 255, 255]


@given(size=st.integers(1, 12))
@law(max_examples=12)
def test_the_cosine_transform_is_orthonormal(size: int) -> None:
    matrix = cosine_matrix(size)
    close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert (matrix[0] > 0).all() and ((matrix.diff(dim=1) != 0).sum(1) > 0).tolist() == [False] + [True] * (size - 1)


def test_the_transform_keeps_lengths_and_gathers_smooth_patches() -> None:
    module = PixelCodec(PixelCodecConfig(8, 8, patch=4))
    close(module.transform @ module.transform.T, torch.eye(48), rtol=0, atol=1e-6)
    gray = module.encode(torch.full((8, 8, 3), 0.5))
    close(gray[:, 0], torch.full((4,), 0.5 * 48**0.5))
    close(gray[:, 1:], torch.zeros(4, 47), rtol=0, atol=1e-6)


def test_tokens_are_patches_in_raster_order() -> None:
    module = PixelCodec(PixelCodecConfig(4, 6, patch=2, cosine=False))
    pixels = normal(4, 6, 3)
    exact(module.encode(pixels)[4].view(2, 2, 3), pixels[2:4, 2:4])


@given(noise=st.sampled_from([0.0, 0.05, 0.5]), cosine=st.booleans(), seed=seeds)
@law(max_examples=6)
def test_fitted_tokens_have_unit_variance(noise: float, cosine: bool, seed: int) -> None:
    module = codec(8, 8, 4, cosine)
    frames = random_frames(400, 8, 8, seed=seed)
    module.fit(frames, noise)
    clean = module.encode(module.signal(frames))
    expected = 1 - (noise / module.scale).square()
    close(clean.flatten(0, 1).var(0), expected, rtol=1e-3, atol=1e-3)
    noised = module.encode(module.signal(frames) + noise * normal(400, 8, 8, 3, seed=seed))
    close(noised.var(), torch.ones(()), rtol=0.02, atol=0)


@pytest.mark.parametrize(("height", "width"), [(65, 64), (64, 60)])
def test_patches_must_divide_the_frame(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=f"patch must divide height and width, got patch 8 for .* {height} x {width}"):
        PixelCodecConfig(height, width, 8)


@pytest.mark.parametrize("patch", [1, 2, 3, 8])
def test_channels_go_from_coarse_to_fine(patch: int) -> None:
    order = coarse_to_fine(patch)
    exact(order.sort().values, torch.arange(3 * patch**2))
    row, column = order // 3 // patch, order // 3 % patch
    assert ((row + column).diff() >= 0).all()
    exact(row[:3] + column[:3], torch.zeros(3, dtype=torch.long))  # a patch's mean colours come first


@pytest.mark.parametrize("cosine", [True, False])
def test_tokens_are_float32_under_autocast_too(cosine: bool) -> None:
    module = codec(cosine=cosine)
    signal = module.signal(random_frames(5, 4, 6))
    tokens = module.encode(signal)
    decoded = module.decode(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        exact(module.encode(signal), tokens)
        exact(module.decode(tokens), decoded)
