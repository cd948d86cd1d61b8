"""A learned world you can step into: a causal normalizing flow over video behind the Gymnasium API."""

from sfv_world import envs as envs  # registers the environments
from sfv_world.loading import load_world
from sfv_world.world import World

__all__ = ["World", "load_world"]
