"""Calibration: which sizes there are to choose from, and what is stored with a world."""

import json
import shutil

import pytest
from gymnasium import spaces

from sfv_world.calibrate import CalibrateConfig, block_sizes, calibrate, store
from sfv_world.checkpoint import DECODING
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.loading import load_world


@pytest.fixture
def folder(build_world, tmp_path):
    return shutil.copytree(build_world("autoregressive"), tmp_path / "world")


def test_the_fastest_size_is_what_the_world_decodes_with(folder):
    found = calibrate(CalibrateConfig(str(folder), steps=2, rows=2, device="cpu"))
    assert found.keys() == {None, 4}  # of six tokens
    best = min(found, key=found.get)
    assert load_world(folder).decoding == DecodingConfig(block=best)
    assert load_world(folder, decoding=DecodingConfig(block=2)).decoding.block == 2


@pytest.mark.parametrize(
    "actions", [spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(-1, 1, (2,))), spaces.Tuple([spaces.Discrete(2)])]
)
def test_worlds_of_any_actions_are_timed(build_world, actions):
    folder = build_world("frame-parallel", actions)
    found = calibrate(CalibrateConfig(str(folder), steps=1, rows=2, device="cpu"))
    assert found.keys() == {None, 4} and (folder / DECODING).exists()


def test_each_kind_of_device_has_its_own(folder):
    store(folder, "cuda:0", DecodingConfig(block=2))
    store(folder, "cpu", DecodingConfig(block=3))
    assert {kind: config["block"] for kind, config in json.loads((folder / DECODING).read_text()).items()} == {
        "cpu": 3,
        "cuda": 2,
    }
    assert load_world(folder).decoding.block == 3


def test_nothing_is_chosen_where_nothing_is_solved(build_world):
    assert block_sizes(load_world(build_world("bands"))) == [None]
    assert block_sizes(load_world(build_world("frame-parallel"))) == [None, 4]


def test_a_damaged_file_is_refused_until_it_is_deleted(folder):
    (folder / DECODING).write_text('{"cpu": {"block": 0}}')
    remedy = r"(?s)decoding.json: expected decoding options.*Delete it, and run `sfv-world calibrate`"
    config = CalibrateConfig(str(folder), steps=1, device="cpu")
    for damaged in (lambda: load_world(folder), lambda: calibrate(config)):
        with pytest.raises(ValueError, match=remedy):
            damaged()
    (folder / DECODING).unlink()
    found = calibrate(config)
    assert load_world(folder).decoding.block == min(found, key=found.get)


@pytest.mark.parametrize("name", ["steps", "rows"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        CalibrateConfig("world", **{name: 0})
