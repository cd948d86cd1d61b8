"""Blending: the mean of all weights of two worlds, one of which began with the other's."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from recorded import said
from tiny import randomised

from sfv_world.blend import BlendConfig, blend
from sfv_world.checkpoint import CONFIG, load_model, save_model
from sfv_world.loading import load_world


@pytest.fixture
def config(build_world, tmp_path):
    """A world, and another one trained from it."""
    other = build_world()
    model, about = load_model(other)
    randomised(model.flow, seed=1)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "starts.safetensors").write_bytes((other / "starts.safetensors").read_bytes())
    save_model(tmp_path / "tuned", model, {**about, "steps": 7})
    return BlendConfig(tmp_path / "tuned", other, tmp_path / "between", share=0.25)


def test_a_blend_lies_between(config, capsys):
    between, about = load_model(blend(config))
    assert f"wrote {config.out}: 75% of {config.world} and 25% of {config.other}" in capsys.readouterr().out
    tuned, other = load_model(config.world)[0].state_dict(), load_model(config.other)[0].state_dict()
    for name, weight in between.state_dict().items():
        torch.testing.assert_close(weight, 0.75 * tuned[name] + 0.25 * other[name], rtol=1e-6, atol=1e-7)
    assert about == {
        "data": {"fps": 8.75}, "steps": 7, "blended": {"other": str(config.other), "share": 0.25}
    }  # fmt: skip
    world = load_world(config.out)
    _, output = world.step(world.start([0, 1]), [0, 1])
    assert output.frames.shape == (2, 16, 24, 3) and output.certificate.max() < 1e-3


def test_worlds_without_start_frames_are_blended(config):
    (config.world / "starts.safetensors").unlink()
    assert load_world(blend(config)).starts is None


def test_worlds_that_know_what_the_other_held_out_are_not_blended(config, tmp_path):
    data, split = {"dataset_id": "mine-v0"}, {"seed": 0, "held_out": 0.05, "episodes": 9}
    other = shutil.copytree(config.other, tmp_path / "other")
    said(config.world, training=split, data=data)
    for change in ({"seed": 1}, {"held_out": 0.1}, {"episodes": 12}):
        said(other, training=split | change, data=data)
        with pytest.raises(ValueError, match=r"other: expected the split that world was .* --episodes 9, got --seed"):
            blend(replace(config, other=other))
    assert not config.out.exists()
    for n, (training, of) in enumerate(
        [(split, data), ({"seed": 0, "held_out": 0.05}, data), ({"seed": 1}, {}), ({}, None)]
    ):
        said(other, training=training, data=of)
        blend(replace(config, other=other, out=tmp_path / str(n)))


def test_what_cannot_be_blended_is_told(config, build_world):
    for share in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match=f"share: expected more than 0 and less than 1, got {share}"):
            replace(config, share=share)
    for other in (build_world(seed=1), build_world("autoregressive")):  # another codec, another shape
        with pytest.raises(ValueError, match=r"other: expected a world of the shape, actions and codec of .*--init"):
            blend(replace(config, other=other))
    assert not config.out.exists()
    blend(config)
    before = json.loads((config.out / CONFIG).read_text())
    with pytest.raises(ValueError, match=r"out: expected a folder without a world, found config.json"):
        blend(replace(config, share=0.5))
    assert json.loads((config.out / CONFIG).read_text()) == before
