"""The released STARFlow layout at full scale: read, run and convert checkpoints of it; presets of the published sizes.

Only shapes and equations are here. The published weights have their own licence, for research only.
"""

from sfv_world.released.config import PRESETS, ReleasedConfig
from sfv_world.released.load import load_released
from sfv_world.released.model import ReleasedFlow
from sfv_world.released.sampling import sample

__all__ = ["PRESETS", "ReleasedConfig", "ReleasedFlow", "load_released", "sample"]
