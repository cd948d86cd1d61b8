"""How a long rollout is told: a table by bins of the horizon, and panels of curves against the step."""

from typing import Any

import numpy as np

from sfv_world.drift import STATISTICS
from sfv_world.plot import BLUE, GREEN, INK, ORANGE, RED, Curve, Panel

LEVEL = 0.05
"""Real frames are called atypical this often."""


def table(results: dict[str, Any]) -> str:
    """What was found, by bins of the horizon."""
    real, config = results["real"], results["config"]
    columns = "{:>11} {:>5} {:>5} {:>5} {:>8} {:>8} {:>6} {:>6} {:>6} {:>6} {:>8} {:>8} {:>6} {:>5}"

    def number(value: float | None, digits: int = 1, percent: bool = False) -> str:
        if value is None:
            return "-"
        return f"{100 * value:.0f}%" if percent else f"{value:.{digits}f}"

    def line(name: str, entry: dict[str, Any], *more: str) -> str:
        return columns.format(
            name,
            *(number(entry[statistic]) for statistic in STATISTICS),
            number(entry["in_range_of_real"], percent=True),
            *more,
        )

    lines = [
        columns.format(
            *("steps", "red", "green", "blue", "contrast", "in range", "PSNR", "(copy)", "SSIM", "(copy)", "bits/dim"),
            *("typical", "judge", "ended"),
        ),
        line("real frames", real, *("-",) * 4, number(real["bits_per_dim"], 3), f"{1 - LEVEL:.0%}", "50%", "-"),
    ]
    for entry in results["bins"]:
        more = [
            number(entry["psnr"]),
            number(entry["psnr_of_copying"]),
            number(entry["ssim"], 2),
            number(entry["ssim_of_copying"], 2),
            number(entry["bits_per_dim"], 3),
            number(entry["typical"], percent=True),
            number(entry["judge_accuracy"], percent=True),
            str(entry["terminated"]),
        ]
        lines.append(line("{}-{}".format(*entry["steps"]), entry, *more))
    policy = f"reset every {config['restart']} frames" if config["restart"] else results["memory"]
    policy += ", each frame cleaned and noised afresh" if config["project"] else ""
    lines.append(
        f"{policy}, temperature {config['temperature']:g}; largest certificate {results['largest_certificate']:.1e}; "
        f"first terminations after {', '.join(str(step or 'never') for step in results['first_termination'])}"
    )
    return "\n".join(lines)


def panels(results: dict[str, Any]) -> list[Panel]:
    """What was found, as panels of a plot against the step."""
    real, bins, by_step = results["real"], results["bins"], results["by_step"]
    ends = [np.array(entry["steps"]) for entry in bins]
    middles = np.array([np.sqrt(first * last) for first, last in ends])

    def stepwise(key: str, name: str, colour: tuple[int, int, int] = INK) -> Curve:
        values = np.array(by_step[key], float)
        return Curve(name, np.arange(1.0, len(values) + 1), values, colour, thin=True)

    def binned(key: str, name: str, colour: tuple[int, int, int] = INK, part: str | None = None) -> Curve:
        entries = [entry[part] if part else entry for entry in bins]
        return Curve(name, middles, np.array([entry.get(key) for entry in entries], float), colour)

    colours = dict(zip(STATISTICS, (RED, GREEN, BLUE, INK), strict=True))
    found = [
        Panel(
            f"{name}: imagined (thin), real at the same step, range of real",
            [stepwise(name, "imagined", colour), binned(name, "real", ORANGE, "real")],
            [(real["range"][name][0], real["range"][name][1], colour)],
        )
        for name, colour in colours.items()
    ]
    one = np.array([1.0, len(by_step["bits_per_dim"])])
    found += [
        Panel(
            f"bits/dim, and {1 - LEVEL:.0%} of real frames",
            [stepwise("bits_per_dim", "imagined")],
            [(real["bits_per_dim_range"][0], real["bits_per_dim_range"][1], BLUE)],
        ),
        Panel(
            "share of frames that are typical; in range of real colours",
            [
                binned("typical", "typical", BLUE),
                binned("in_range_of_real", "in range", GREEN),
                Curve("", one, np.zeros(2)),
            ],
            [(1 - LEVEL, 1.0, INK)],
        ),
        Panel(
            "PSNR to the real continuation, dB",
            [stepwise("psnr", "imagined"), binned("psnr_of_copying", "copy of the last observed frame", ORANGE)],
        ),
        Panel(
            "accuracy of a judge of real and imagined frames",
            [binned("judge_accuracy", "on other episodes", RED), Curve("", one, np.ones(2))],
            [(0.49, 0.51, INK)],
        ),
    ]
    return found
