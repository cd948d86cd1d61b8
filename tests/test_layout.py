"""The layout tells the story: imports follow the data flow, nothing heavy or unwanted is pulled in."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "interrupt", "memory", "transfer", "graphs", "chance", "given", "layers", "flow", "decoding", "control", "pretrained", "codec",
    "heads", "denoiser", "model", "checkpoint", "released", "data", "state", "world", "loading", "blend", "calibrate", "film",
    "plot", "training", "card", "lossless", "evaluation", "counterfactual", "drift", "free_run", "horizon_report", "horizon",
    "envs", "agents", "generate", "demo", "cli",
]  # fmt: skip
ALLOWED_UPWARDS = {("data", "envs"), ("data", "agents")}  # collecting plays real environments


def modules():
    for folder, prefix in (
        (ROOT / "sfv_world", "sfv_world"),
        (ROOT / "envs", "sfv_world.envs"),
        (ROOT / "agents", "sfv_world.agents"),
    ):
        for path in folder.rglob("*.py"):
            yield path, ".".join([prefix, *path.relative_to(folder).with_suffix("").parts])


def room(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ORDER else None


def test_imports_follow_the_data_flow():
    for path, module in modules():
        assert path.name in ("__init__.py", "__main__.py") or room(module), f"{module} has no place in ORDER"
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert name.split(".")[0] not in ("envs", "agents", "torchvision"), f"{path} imports {name}"
                here, there = room(module), room(name)
                if here and there and (here, there) not in ALLOWED_UPWARDS:
                    assert ORDER.index(there) <= ORDER.index(here), f"{module} imports {name}, which comes later"


@pytest.mark.parametrize("name", ["envs", "agents", "checkpoints"])
def test_the_package_links_to_the_folders_at_the_root(name):
    assert os.readlink(ROOT / "sfv_world" / name) == f"../{name}"


def test_every_package_is_in_the_wheel():
    declared = (ROOT / "pyproject.toml").read_text()
    for path in [*(ROOT / "sfv_world").glob("*/__init__.py"), *(ROOT / "envs").glob("__init__.py")]:
        assert f'"sfv_world.{path.parent.name}"' in declared


def test_importing_registers_ids_and_does_nothing_else():
    code = (
        "import torch, random, numpy as np; before = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads();"
        "import sfv_world, gymnasium as gym;"
        "assert 'sfv_world/World-v0' in gym.registry;"
        "after = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads();"
        "assert torch.equal(before[0], after[0]) and before[1:] == after[1:];"
        "import sys; assert 'vizdoom' not in sys.modules and 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)
