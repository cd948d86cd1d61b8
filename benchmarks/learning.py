"""Which world learns best and steps fastest: each kind trained on the same data for the same time, then measured.

    python benchmarks/learning.py --data data/doom-basic --minutes 60

Trains as `sfv-world train` does, calibrates as `sfv-world calibrate` does and measures as `sfv-world evaluate` and
`benchmarks/speed.py` do. Prints a table and writes JSON with the machine, the versions and the commit. Run it alone on the machine.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from report import Report, Rows, command
from speed import time_steps

from sfv_world.calibrate import CalibrateConfig, calibrate
from sfv_world.evaluation import EvaluateConfig, density, rollouts, split_as_trained
from sfv_world.given import DEVICE, set_threads
from sfv_world.loading import load_world
from sfv_world.lossless import lossless
from sfv_world.training.config import TrainConfig
from sfv_world.training.run import STATE
from sfv_world.training.trainer import Trainer
from sfv_world.world import World

Variant = Literal["frame-parallel", "frame-parallel-raster", "autoregressive", "latent"]
VARIANTS: dict[str, dict[str, Any]] = {
    "frame-parallel": {"kind": "frame-parallel"},
    "frame-parallel-raster": {"kind": "frame-parallel", "bands": 0},
    "autoregressive": {"kind": "autoregressive"},
    "latent": {"kind": "frame-parallel"},
}
"""What `sfv-world train` is told: either deep flow as it is by default, the frame-parallel one with raster blocks, and a world of
the latents of a codec."""


@dataclass(frozen=True)
class LearningConfig:
    """What to train and measure."""

    data: Path
    """Folder of a Minari dataset with image observations (see `sfv-world collect`)."""
    minutes: float = 60.0
    """Minutes of training, for each world."""
    kinds: tuple[Variant, ...] = ("frame-parallel", "autoregressive")
    """What to train."""
    codec: Path | None = None
    """Folder of a codec for the kind `latent` (see `sfv-world train-codec`)."""
    preset: Literal["tiny", "small", "base"] = "small"
    """Size: about 1, 4 or 21 million parameters."""
    patch: int = 8
    """Side of a patch, in pixels."""
    window: int = 6
    """Frames the deep flow sees."""
    clip: int = 10
    """Frames of a training clip."""
    held_out: float = 0.05
    """Part of the episodes that is never trained on."""
    resume: bool = False
    """Continue the runs in `worlds` that were begun; those that are complete are only measured."""
    clips: int = 64
    """Held-out clips to roll out."""
    rollouts: int = 3
    """Imagined rollouts of each clip, averaged for PSNR."""
    context: int = 8
    """Observed frames before a rollout."""
    frames: int = 4000
    """Held-out frames to score, at most, each once."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes at which steps are timed."""
    steps: int = 200
    """Most steps of each timing."""
    seconds: float = 30.0
    """A timing stops after so many seconds, but not before 10 steps."""
    seed: int = 0
    """Seed of the runs and of all measurements."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: str = DEVICE
    """Where to train and step."""
    worlds: Path = Path("out/learning")
    """Folder of the worlds that are trained."""
    out: Path = Path("out/learning.json")
    """Where the JSON goes."""

    def __post_init__(self) -> None:
        if not self.kinds or not self.minutes > 0:
            expected = f"kinds, minutes: expected at least one kind and a time, got {self.kinds} and {self.minutes}."
            raise ValueError(f"{expected} Name some of {', '.join(VARIANTS)}.")
        if ("latent" in self.kinds) != (self.codec is not None):
            raise ValueError(
                f"codec: expected a folder with the kind latent, and none without, got {self.codec} and kinds {self.kinds}."
            )


def trained(config: TrainConfig, resume: bool) -> tuple[World, float]:
    """Trains a world, or goes on with the run in its folder; gives it and the frames a second that it was trained on."""
    options = {field: getattr(config, field) for field in config.__dataclass_fields__}
    trainer = Trainer(TrainConfig(**{**options, "resume": resume and (config.out / STATE).exists()}))
    trainer.run()
    return load_world(config.out, config.device), trainer.frames_a_step * trainer.step / trainer.elapsed


def measure(folder: Path, config: LearningConfig) -> dict[str, Any]:
    """A trained world's row of the table: what it learned, and what a step costs, decoding as calibrated for the device."""
    calibrate(CalibrateConfig(str(folder), min(20, config.steps), device=config.device))
    world = load_world(folder, config.device)
    train, held_out = split_as_trained(world, config.data)
    evaluation = EvaluateConfig(
        world=str(folder),
        data=config.data,
        clips=config.clips,
        rollouts=config.rollouts,
        context=config.context,
        seed=config.seed,
    )
    found = density(load_world(folder), train, held_out, config.frames, config.seed)
    rolled = rollouts(world, held_out, evaluation)
    timings = [time_steps(world, rows, config.steps, config.seconds) for rows in config.batches]
    return {
        "held_out_bits_per_dim": found["bits_per_dim"],
        "bits_without_loss": lossless(world, train, held_out, config.clips, config.seed)["bits_per_colour_value"],
        **{f"psnr_{horizon}": value for horizon, value in rolled["psnr_of_the_mean"]["decibels"].items()},
        "deep_sweeps": rolled["deep_sweeps"],
        "shallow_sweeps": rolled["shallow_sweeps"],
        "largest_certificate": rolled["largest_certificate"],
        "tokens_solved_together": world.decoding.block or world.model.config.flow.tokens,
        **{f"ms_a_frame_at_batch_{timing.rows}": 1000 / timing.frames_per_second for timing in timings},
    }


def main(config: LearningConfig) -> None:
    """Trains, measures and writes."""
    set_threads(config.threads)
    report = Report(config.out, config, config.device)
    rows: Rows = []
    for name in config.kinds:
        print(f"\n{name}: {config.minutes:g} minutes of training")
        training = TrainConfig(
            data=config.data,
            out=config.worlds / name,
            preset=config.preset,
            minutes=config.minutes,
            codec=config.codec if name == "latent" else None,
            patch=None if name == "latent" else config.patch,
            window=config.window,
            clip=config.clip,
            held_out=config.held_out,
            seed=config.seed,
            denoiser=False,
            device=config.device,
            threads=config.threads,
            **VARIANTS[name],
        )
        world, rate = trained(training, config.resume)
        row = {
            "world": name,
            "million_parameters": sum(parameter.numel() for parameter in world.model.parameters()) / 1e6,
            "minutes": world.about["minutes"],
            "steps": world.about["steps"],
            "training_frames_per_second": rate,
            **measure(training.out, config),
        }
        rows.append(row)
        title = f"Trained {config.minutes:g} minutes each on {config.data.name}; PSNR of the mean of {config.rollouts} rollouts, dB"
        report.table("learning", title, rows)


if __name__ == "__main__":
    command(main, LearningConfig, __doc__)
