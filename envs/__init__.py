"""Gymnasium environments: real ones as images, and learned ones behind the same contract."""

from gymnasium.envs.registration import register

register(
    "sfv_world/World-v0",
    "sfv_world.envs.world_env:WorldEnv",
    vector_entry_point="sfv_world.envs.vector_env:WorldVectorEnv",
)
