"""What all training runs share: what they are told, the learning rate and the average that follow from it, and the bar."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from sfv_world.given import DEVICE, check_seed

RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    **dict.fromkeys(
        ("steps", "minutes", "warmup", "batch", "window", "learning_rate", "denoiser_learning_rate", "gradient_clip"),
        ("more than 0", lambda value: 0 < value < math.inf),
    ),
    **dict.fromkeys(("validate_minutes", "weight_decay"), ("at least 0", lambda value: value >= 0)),
    "ema": ("at least 0 and less than 1", lambda value: 0 <= value < 1),
    "held_out": ("more than 0 and less than 1", lambda value: 0 < value < 1),
}
"""Where the numbers of runs lie."""


@dataclass(frozen=True)
class RunConfig:
    """What every training run is told."""

    data: Path
    """Folder of a Minari dataset with image observations (see `sfv-world collect`)."""
    out: Path
    """Folder of what is trained."""
    steps: int | None = None
    """Stop after this many steps."""
    minutes: float | None = None
    """Stop after this many minutes of training, those of resumed runs included. With both, whichever comes first."""
    resume: bool = False
    """Continue the run in `out`, which must have the same configuration up to its length."""
    batch: int = 2
    """Clips of a batch, those of all processes together."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    warmup: int = 50
    """Steps in which the learning rate rises; after them it falls along a cosine to 1% of its peak."""
    weight_decay: float = 0.01
    """Weight decay of matrices."""
    gradient_clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.998
    """Decay of the moving average of the weights, a step; less in the first steps."""
    held_out: float = 0.05
    """Part of the episodes that is never trained on."""
    episodes: int | None = None
    """How many episodes of the recording are used, the first ones: to train on and to hold out. None: all that there are when the
    run begins, or as many as the world or the codec it begins with had of them; a resumed run leaves out those recorded later."""
    validate_minutes: float = 2.0
    """Minutes between validations, samples and checkpoints."""
    seed: int = 0
    """Seed of the split, the weights, the data of every step and its noise."""
    device: str = DEVICE
    """Where to train; worlds in bfloat16 (autocast) on CUDA."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            raise ValueError("steps, minutes: expected at least one of them, got neither. Say when to stop.")
        for name, (expected, fits) in RANGES.items():
            value = getattr(self, name, None)
            if value is not None and not fits(value):
                raise ValueError(f"{name}: expected {expected}, got {value}.")
        check_seed(self.seed)


def progress(config: RunConfig, step: int, elapsed: float) -> float:
    """How far a run has come after so many steps and seconds: 0 at its beginning, 1 or a little more at its end."""
    by_steps = step / config.steps if config.steps else 0.0
    by_time = elapsed / (60 * config.minutes) if config.minutes else 0.0
    return max(by_steps, by_time)


def rate(config: RunConfig, step: int, elapsed: float) -> float:
    """Part of the peak learning rate: it rises in the warm-up, then falls along a cosine to 1%."""
    cosine = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress(config, step, elapsed))))
    return min(1.0, (step + 1) / config.warmup) * cosine


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An update for `AveragedModel`. It begins with the latest weights: a short run would else remember its random beginning."""

    def update(averages: Any, parameters: Any, count: Any) -> None:
        begun = (int(count) + 1) / (int(count) + 10)
        get_ema_multi_avg_fn(min(decay, begun))(averages, parameters, count)

    return update


class RunBar:
    """The progress bar of a run: of its steps where they are counted, else of its time."""

    def __init__(self, config: RunConfig, step: int, elapsed: float, disable: bool = False):
        self.config = config
        total = 1000 if config.steps is None else config.steps
        self.bar = tqdm(total=total, initial=self._done(step, elapsed), unit="step", disable=disable)
        if config.steps is None:
            self.bar.bar_format = "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

    def show(self, step: int, elapsed: float, told: str) -> None:
        """Moves on, and tells beside the bar."""
        self.bar.set_postfix_str(f"step {step}, {told}", refresh=False)
        self.bar.update(self._done(step, elapsed) - self.bar.n)

    def _done(self, step: int, elapsed: float) -> int:
        return step if self.config.steps else int(1000 * min(1.0, progress(self.config, step, elapsed)))
