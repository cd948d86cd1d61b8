"""Memory: rows that there is no room for are told before anything is begun or changed."""

import math
import os

import numpy as np
import pytest
import torch

from sfv_world import memory
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.memory import Need, available, check_memory, check_rows, left_by_groups

TOLD = r"memory: expected about .* GB free on cpu \(.* rows .*\), got 0.00 GB. Give fewer rows."


def test_what_is_free_is_less_than_there_is():
    assert 0 < available(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_what_control_groups_leave_is_less(tmp_path, monkeypatch):
    def group(name, limit, used, cached, files=("memory.max", "memory.current")):
        folder = tmp_path / "sys/fs/cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, value in zip(
            (*files, "memory.stat"), (limit, used, f"anon 1\ninactive_file {cached}\n"), strict=True
        ):
            (folder / file).write_text(f"{value}\n")

    (tmp_path / "proc/self").mkdir(parents=True)
    told = tmp_path / "proc/self/cgroup"
    assert left_by_groups(tmp_path) == math.inf
    told.write_text("0::/batch/job\n")
    assert left_by_groups(tmp_path) == math.inf
    group("batch/job", "max", 500, 0)
    assert left_by_groups(tmp_path) == math.inf
    group("batch", 9000, 5000, 300)
    assert left_by_groups(tmp_path) == 4300
    group("batch/job", 5000, 4000, 100)
    assert left_by_groups(tmp_path) == 1100
    group(".", 1000, 900, 50)
    assert left_by_groups(tmp_path) == 150
    told.write_text("5:cpu,cpuacct:/a\n4:memory:/b\n")
    group("memory/b", 700, 600, 20, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert left_by_groups(tmp_path) == 120
    monkeypatch.setattr(memory, "left_by_groups", lambda: 77.0)
    assert available(torch.device("cpu")) == 77


def test_what_is_needed_is_told_by_its_parts(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 3e9)
    check_memory([Need("a", 1e9), Need("b", 2e9)], torch.device("cpu"), "Go.")
    with pytest.raises(ValueError, match=r"expected about 3.50 GB free on cpu \(a 1.50, b 2.00\), got 3.00 GB. Go."):
        check_memory([Need("a", 1.5e9), Need("b", 2e9)], torch.device("cpu"), "Go.")


def test_few_rows_are_not_asked_about(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: pytest.fail("asked"))
    check_rows(memory.UNASKED // 10**6, 1e6, torch.device("cpu"))


def test_a_state_knows_its_size(tiny_world):
    state = tiny_world.start([1, 2, 3])
    assert state.size == sum(t.nbytes for t in state.tensors().values()) - state.seeds.nbytes - state.ages.nbytes
    assert tiny_world.model.row_size(4, tiny_world.decoding) > state.size / 3 > 0


def test_rows_that_do_not_fit_are_told_before_they_are_begun(tiny_world, monkeypatch):
    state, few = tiny_world.start([1, 2]), tiny_world.start([1])
    frames = np.zeros((40, 4, 16, 24, 3), np.uint8)
    envs = WorldVectorEnv(2, world=tiny_world, max_episode_steps=9)
    envs.reset(seed=0)
    monkeypatch.setattr(memory, "UNASKED", 0)
    monkeypatch.setattr(memory, "available", lambda device: few.size)
    with pytest.raises(ValueError, match=TOLD):
        state[[0, 1, 1]]
    with pytest.raises(ValueError, match=TOLD):
        tiny_world.start(np.arange(40))
    with pytest.raises(ValueError, match=TOLD):
        tiny_world.reset(frames)
    with pytest.raises(ValueError, match=TOLD):
        tiny_world.score(frames)
    with pytest.raises(ValueError, match=TOLD):
        envs.save_state([0, 1])
    with pytest.raises(ValueError, match=TOLD):
        envs.reset(seed=1)
    monkeypatch.undo()
    # Nothing was used up, and nothing of the environment has changed.
    again = WorldVectorEnv(2, world=tiny_world, max_episode_steps=9)
    again.reset(seed=0)
    for mine, other in zip(envs.step([0, 1])[:4], again.step([0, 1])[:4], strict=True):
        assert np.array_equal(mine, other)
    tiny_world.step(state, [0, 1])
    assert len(few[[0, 0, 0]]) == 3
