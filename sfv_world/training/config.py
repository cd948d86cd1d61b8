"""What a training run can be told: the options of `sfv-world train`, and which of them go together."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sfv_world.flow.model import DeepKind
from sfv_world.training.distributed import Parallel
from sfv_world.training.objective import ObjectiveConfig
from sfv_world.training.schedule import RunConfig

PRESETS = {"tiny": 2, "small": 4, "base": 8}
"""The one dial of `model_config`, by name."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """How to train a world."""

    preset: Literal["tiny", "small", "base"] = "small"
    """Size: about 1, 4 or 21 million parameters."""
    kind: DeepKind = "frame-parallel"
    """Which deep flow."""
    bands: int | None = None
    """Bands of the shallow flow, 0 for raster blocks; none: what goes best with the deep flow."""
    groups: Literal[1, 2, 4] = 1
    """Groups of patches that the coarsest band is drawn in, one after the other: more hang together better, each takes a pass."""
    bins: int = 0
    """Bins of the curves that the coarsest band is drawn with, a patch's brightness before its colour and that before the rest: for
    worlds in which things are here or there. 0: affine maps, all at once."""
    init: Path | None = None
    """World (a folder, or a shipped one's name) whose weights to start from, those of the shallow flow only where the bands are its
    own or parts of them; none: random ones. It may have another window, other groups and bins, and be of another game with
    other actions. With `freeze_backbone` a released model, which `sfv-world convert` makes, or a world on one, whose adapter is
    trained on."""
    freeze_backbone: bool = False
    """Train a control adapter and heads on the released model in `init`, which stays as it is and decides the sizes."""
    prompt: str = ""
    """What a released model is told to show; that of the world in `init`, if it is one and nothing is given."""
    codec: Path | None = None
    """Folder of a codec (see `sfv-world train-codec`) to train a world of its latents; none: a world of pixels."""
    patch: int | None = None
    """Side of a patch, in pixels or, with a codec, in places of its latents; none: 8 pixels, or 2 places."""
    window: int = 6
    """Frames the deep flow sees."""
    noise: float | None = None
    """Standard deviation of the noise on pixels in [-1, 1] or, with a codec, on its latents, which have variance 1; none: 0.05,
    or what the codec's decoder was trained with."""
    clip: int = 10
    """Frames of a clip; on a released model cut to whole steps of its codec (1 + a multiple of 4 frames)."""
    busy: float = 0.0
    """Part of the clips that begin where something just moved a lot; see `ClipSampler.busy`."""
    denoiser_learning_rate: float = 2e-3
    """Peak learning rate of the denoiser's own."""
    denoiser: bool = True
    """Whether to train a denoiser along."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """Parts of the loss."""
    parallel: Parallel = "ddp"
    """What each process that `torchrun` started keeps: a copy of all weights, or a shard of them and of all that AdamW knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip < 2:
            raise ValueError(f"clip: expected at least 2 frames, got {self.clip}.")
        if self.bands is not None and self.bands < 0:
            raise ValueError(f"bands: expected none or at least 0, got {self.bands}.")
        if self.freeze_backbone and self.init is None:
            raise ValueError(
                "freeze_backbone: expected the folder of a released model in init, got none. Give it (--init); "
                "`sfv-world convert` makes one."
            )
        decided = (self.codec, self.patch, self.bands, self.bins, self.groups - 1)
        if self.freeze_backbone and (self.parallel != "ddp" or any(decided)):
            raise ValueError(
                "freeze_backbone: expected --parallel ddp and no codec, patch, bands, bins or groups, which the released model "
                f"decides, got {self.parallel}, {self.codec}, {self.patch}, {self.bands}, {self.bins} and {self.groups}. Leave "
                "them out."
            )
        options = ("preset", "kind", "window", "denoiser")
        own = {name: getattr(self, name) for name in options if getattr(self, name) != getattr(TrainConfig, name)}
        if self.freeze_backbone and own:
            raise ValueError(
                f"freeze_backbone: expected no preset, kind, window or --no-denoiser, which the released model decides, got {own}. "
                "Leave them out."
            )
        if self.bins and not (self.kind == "frame-parallel" if self.bands is None else self.bands):
            raise ValueError(
                f"bins: expected 0 for a shallow flow without bands, got {self.bins}. Choose bands (--bands) or leave it out."
            )
        if self.objective.errors and (self.freeze_backbone or self.kind != "frame-parallel"):
            raise ValueError(
                f"objective.errors: expected 0 but for a frame-parallel deep flow of our own, got {self.objective.errors}."
            )
        if self.objective.imagined and (self.freeze_backbone or self.kind != "frame-parallel" or self.bands == 0):
            raise ValueError(
                "objective.imagined: expected 0 but for a frame-parallel deep flow of our own and bands, got "
                f"{self.objective.imagined}."
            )
        if self.prompt and not self.freeze_backbone:
            raise ValueError(f"prompt: expected none without --freeze-backbone, got {self.prompt!r}. Leave it out.")
