"""How far imagined frames are from real ones: colour and contrast, similarity, typicality, a classifier.

None of it needs a world: frames are uint8, what a world says of them (bits per dimension) is a number a frame.
"""

import cv2
import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""
STATISTICS = ("red", "green", "blue", "contrast")
"""What `colour_and_contrast` measures, in levels of 255."""


def colour_and_contrast(frames: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b 4"]:
    """Mean red, green and blue of each frame, and the standard deviation of its brightness, in levels of 255."""
    contrast = (frames @ LUMA).std(axis=(-2, -1))
    return np.concatenate([frames.mean(axis=(-3, -2)), contrast[..., None]], axis=-1)


def squared_error(a: UInt8[np.ndarray, "*b h w 3"], b: UInt8[np.ndarray, "*b h w 3"]) -> Float[np.ndarray, "*b"]:
    """Mean squared difference of each pair of frames, in levels of 255, squared."""
    return np.square(a.astype(np.float32) - b).mean(axis=(-3, -2, -1))


def ssim(a: UInt8[np.ndarray, "n h w 3"], b: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n"]:
    """Structural similarity of each pair of frames, 1 for equal ones, averaged over places and colours.

    Gaussian windows of 11 x 11 pixels with a standard deviation of 1.5, mirrored at the borders (Wang et al., Image quality
    assessment, 2004, equation 13).
    """
    return np.array([_ssim(one.astype(np.float64), other.astype(np.float64)) for one, other in zip(a, b, strict=True)])


def _ssim(a: np.ndarray, b: np.ndarray) -> float:
    def blur(x: np.ndarray) -> np.ndarray:
        return np.asarray(cv2.GaussianBlur(x, (11, 11), 1.5, borderType=cv2.BORDER_REFLECT))

    luminance, structure = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + luminance) * (2 * covariance + structure)
    return float((alike / ((mean_a**2 + mean_b**2 + luminance) * (var_a + var_b + structure))).mean())


def typicality(
    values: Float[np.ndarray, "*b"], centre_from: Float[np.ndarray, "n"], compared_with: Float[np.ndarray, "m"]
) -> Float[np.ndarray, "*b"]:
    """Conformal p-values of a two-sided test: is a frame's density as far from the usual as a real frame's may be?

    How far a value is from the median of `centre_from` is ranked among how far those of `compared_with` are. Real frames' p-values
    are uniform. Both sides count, because frames outside the typical set are often *likelier* than real ones (Nalisnick et al.,
    arXiv 1906.02994).

    Args:
        values: bits per dimension of the frames to test.
        centre_from: those of some real frames.
        compared_with: those of other real frames.
    """
    centre = np.median(centre_from)
    distances = np.sort(np.abs(compared_with - centre))
    at_least = len(distances) - np.searchsorted(distances, np.abs(values - centre), side="left")
    return (1 + at_least) / (len(distances) + 1)


class Judge(nn.Module):
    """Tells imagined frames from real ones: three convolutions, the mean over places, and a score for "imagined"."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.score = nn.Linear(2 * width, 1)

    def forward(self, pixels: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n"]:
        """Scores, above 0 for "imagined"."""
        return self.score(self.layers(pixels).mean(dim=(-2, -1)))[:, 0]


def train_judge(
    real: UInt8[np.ndarray, "n h w 3"],
    imagined: UInt8[np.ndarray, "m h w 3"],
    seed: int = 0,
    steps: int = 300,
    batch: int = 64,
) -> Judge:
    """Trains a judge on batches that are half real and half imagined; torch's global generator stays as it is."""
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    labels = (torch.arange(batch) >= batch // 2).float()
    for _ in range(steps):
        chosen = [kind[rng.integers(len(kind), size=batch // 2)] for kind in (real, imagined)]
        loss = binary_cross_entropy_with_logits(judge(_pixels(np.concatenate(chosen))), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge


@torch.no_grad()
def judged_imagined(judge: Judge, frames: UInt8[np.ndarray, "n h w 3"], batch: int = 256) -> Bool[np.ndarray, "n"]:
    """Whether a judge takes each frame for an imagined one."""
    parts = [frames[first : first + batch] for first in range(0, len(frames), batch)]
    return np.concatenate([(judge(_pixels(part)) > 0).numpy() for part in parts])


def _pixels(frames: UInt8[np.ndarray, "n h w 3"]) -> Float[Tensor, "n 3 h w"]:
    return rearrange(torch.from_numpy(frames), "n h w c -> n c h w").float() / 127.5 - 1
