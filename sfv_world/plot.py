"""Line plots drawn with OpenCV: panels of curves over a logarithmic axis, enough to see a drift."""

from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Float, UInt8

INK, GREY = (40, 40, 40), (200, 200, 200)
RED, GREEN, BLUE, ORANGE = (200, 40, 40), (40, 140, 60), (40, 80, 200), (220, 130, 20)
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 34
"""Margins of a panel, in pixels."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    name: str
    x: Float[np.ndarray, "n"]
    """Positive, increasing."""
    y: Float[np.ndarray, "n"]
    """NaN where there is nothing to draw."""
    colour: Colour = INK
    thin: bool = False


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes."""

    title: str
    curves: list[Curve]
    bands: list[tuple[float, float, Colour]] = field(default_factory=list)
    """Ranges (from, to, colour) shaded all along: where real frames are."""


def draw(panels: list[Panel], columns: int = 2) -> UInt8[np.ndarray, "h w 3"]:
    """Panels side by side and below each other, as an RGB image."""
    pictures = [_draw_panel(panel) for panel in panels]
    pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    lines = [np.concatenate(pictures[first : first + columns], axis=1) for first in range(0, len(pictures), columns)]
    return np.concatenate(lines)


def _draw_panel(panel: Panel) -> UInt8[np.ndarray, "h w 3"]:
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    xs = np.concatenate([curve.x for curve in panel.curves])
    ys = np.concatenate([*(curve.y for curve in panel.curves), *([low, high] for low, high, _ in panel.bands)])
    ys = ys[np.isfinite(ys)] if np.isfinite(ys).any() else np.zeros(1)
    margin = max(0.06 * float(ys.max() - ys.min()), 1e-3 * max(1.0, float(np.abs(ys).max())))
    low, high = float(ys.min()) - margin, float(ys.max()) + margin
    first, last = np.log(float(xs.min())), np.log(max(float(xs.max()), 1.01 * float(xs.min())))

    def place(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        across = LEFT + (np.log(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return np.stack([across, down], axis=-1).round().astype(np.int32)

    ends = np.exp([first, last])
    for bottom, top, colour in panel.bands:
        (left, below), (right, above) = place(ends, np.array([bottom, top])).tolist()
        shade = np.array(colour) * 0.18 + 255 * 0.82
        area = image[above : below + 1, left : right + 1]
        area[:] = np.minimum(area, shade.astype(np.uint8))
    _write(image, panel.title, (LEFT, 20))
    ticks = [tick for tick in (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000) if ends[0] <= tick <= ends[1]]
    for tick in ticks:
        x = int(place(np.array([tick]), np.array([low]))[0, 0])
        cv2.line(image, (x, TOP), (x, HEIGHT - BOTTOM), GREY)
        _write(image, str(tick), (x - 4 * len(str(tick)), HEIGHT - BOTTOM + 18))
    for tick in np.linspace(low + margin, high - margin, 4):
        y = int(place(ends[:1], np.array([tick]))[0, 1])
        cv2.line(image, (LEFT, y), (WIDTH - RIGHT, y), GREY)
        _write(image, f"{tick:.4g}", (6, y + 4))
    cv2.rectangle(image, (LEFT, TOP), (WIDTH - RIGHT, HEIGHT - BOTTOM), INK)
    names = LEFT + 8
    for curve in panel.curves:
        points = place(curve.x, np.where(np.isfinite(curve.y), curve.y, low))
        known = np.isfinite(curve.y)
        for a, b in zip(
            np.flatnonzero(known[:-1] & known[1:]), np.flatnonzero(known[:-1] & known[1:]) + 1, strict=True
        ):
            cv2.line(image, points[a].tolist(), points[b].tolist(), curve.colour, 1 if curve.thin else 2, cv2.LINE_AA)
        for alone in points[known & ~np.append(known[1:], False) & ~np.append(False, known[:-1])]:
            cv2.circle(image, alone.tolist(), 3, curve.colour, -1, cv2.LINE_AA)
        _write(image, curve.name, (names, TOP + 16), curve.colour)
        names += 8 * len(curve.name) + 12
    return image


def _write(image: np.ndarray, text: str, place: tuple[int, int], colour: Colour = INK) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1, cv2.LINE_AA)
