"""Gymnasium environments: real ones as images, and learned ones behind the same contract."""

import os
from functools import partial

import torch
from gymnasium.envs.registration import register

register(
    "sfv_world/World-v0",
    "sfv_world.envs.world_env:WorldEnv",
    vector_entry_point="sfv_world.envs.vector_env:WorldVectorEnv",
)

if hasattr(os, "register_at_fork"):
    # Gymnasium's AsyncVectorEnv forks, and so may others. Torch's threads stay behind in the parent, and who gave them work in the
    # child would wait for ever.
    os.register_at_fork(after_in_child=partial(torch.set_num_threads, 1))
