"""Configurations of the released layout, the full sizes, and the plan that `sfv-world info` prints."""

import json
import math
import re
from dataclasses import asdict, replace

import pytest
import torch
from released import REFERENCE, TINY

from sfv_world import cli
from sfv_world.released import PRESETS, ReleasedFlow, load_released
from sfv_world.released.config import FIXED, find_config
from sfv_world.released.load import expected_shapes, open_checkpoint
from sfv_world.released.plan import InfoConfig, info, parameter_counts, plan


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"channels": 100}, "channels must be a positive multiple of head_dim 16, got 100"),
        ({"head_dim": 24}, "head_dim must be a positive multiple of 16"),
        ({"layers_per_block": []}, "layers_per_block must be"),
        ({"txt_size": 0}, "txt_size must be at least 1, got 0"),
        ({"temporal_causal": 3}, "temporal_causal must be 0, 1 or 2, got 3"),
        ({"num_blocks": 4}, "num_blocks 4 does not match"),
        ({"width": 4}, r"unknown names \['width'\]"),
        ({"action_space": {}}, "expected a released model, got a world"),
        ({"in_channels": "many"}, "in_channels: .*integer"),
        *(({name: "other"}, f"{name} must be .*, got 'other'; other variants") for name in FIXED),
    ],
)
def test_configurations_that_are_not_read(tmp_path, values, expected):
    (tmp_path / "config.json").write_text(json.dumps({**asdict(TINY), **values}))
    with pytest.raises(ValueError, match=expected):
        find_config(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"), [("[]", "JSON object"), ("{", "cannot be read"), ("{}", "in_channels: ")]
)
def test_files_that_are_no_configuration(tmp_path, text, expected):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=expected):
        find_config(tmp_path / "config.json")
    with pytest.raises(ValueError, match="expected a JSON file or one of .*starflow-v-7b.*, found neither"):
        find_config(tmp_path / "nothing")


LINEAR = ("weight", "bias")
LAYER = [
    *(f"{part}.{leaf}" for part in ("attention.norm", "attention.qkv", "attention.proj") for leaf in LINEAR),
    *(f"{part}.{leaf}" for part in ("mlp.norm", "mlp.main.0", "mlp.main.2") for leaf in LINEAR),
]


def keys_of(depth, text, sos):
    parts = ["proj_in", "proj_out", *(["proj_txt"] if text else [])]
    names = [f"{part}.{leaf}" for part in parts for leaf in LINEAR] + ["final_norm.weight"] + ["sos_embed"] * sos
    return names + [f"attn_blocks.{j}.{leaf}" for j in range(depth) for leaf in LAYER]


@pytest.mark.parametrize("name", PRESETS)
def test_the_full_sizes(name):
    config = find_config(name)
    shapes = expected_shapes(config)
    keys = [f"blocks.{i}.{key}" for i in range(5) for key in keys_of(2, text=False, sos=True)]
    keys += [f"blocks.5.{key}" for key in keys_of(24, text=True, sos=True)]
    if config.learnable_self_denoiser:
        keys += [f"learnable_self_denoiser.{key}" for key in keys_of(8, text=True, sos=False)]
    assert sorted(shapes) == sorted(keys)
    counts = {part: round(count / 1e9, 1) for part, count in parameter_counts(config).items()}
    assert (
        counts
        == {
            "starflow-v-7b": {"deep": 4.8, "shallow": 1.1, "denoiser": 0.9},
            "starflow-3b": {"deep": 2.7, "shallow": 1.1, "denoiser": 0.0},
        }[name]
    )
    with torch.device("meta"):
        flow = ReleasedFlow(config)
    assert sum(parameter.numel() for parameter in flow.parameters()) == sum(map(math.prod, shapes.values()))
    assert all(parameter.is_meta for parameter in flow.parameters())


def test_a_preset_is_found_by_its_tensors(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", lambda: TINY)
    torch.save({**ReleasedFlow(TINY).state_dict(), "var": torch.zeros(3)}, tmp_path / "tiny.pth")
    assert load_released(tmp_path / "tiny.pth").config == TINY
    assert "var" in open_checkpoint(tmp_path / "tiny.pth").shapes


def test_info_prints_a_plan(capsys):
    cli.main(["info"])
    out = capsys.readouterr().out
    assert "starflow-v-7b: 6.89 B parameters (deep 4.84 B, shallow 1.14 B, denoiser 0.91 B)" in out
    assert "does not fit" not in out
    assert re.search(r"weights +13\.8\n", out) and re.search(r"deep block, token by token +\d+\n", out)
    cli.main(["info", "starflow-3b", "--memory", "4"])
    out = capsys.readouterr().out
    assert "1 x 1 frames of 32 x 32 tokens" in out and "does not fit" in out
    cli.main(["info", str(REFERENCE / "starflow_v_tiny" / "config.json")])
    out = capsys.readouterr().out
    assert "3.30 M parameters" in out and not re.search(r" 0(\.0+)?\n", out)


def test_a_model_without_a_denoiser_is_cleaned_by_a_backward_pass(tmp_path, capsys):
    """All layers keep their activations for it, and it takes as long again as the pass before it."""
    bare = replace(TINY, learnable_self_denoiser=False)
    (tmp_path / "config.json").write_text(json.dumps(asdict(bare)))
    work = InfoConfig(str(tmp_path), frames=4, rows=1, columns=3, batch=2)
    found, usual = info(work), plan(TINY, work)
    out, kept = capsys.readouterr().out, "activations kept for the score, about"
    about = found.memory["activations of a parallel pass, about"]
    assert found.memory[kept] == pytest.approx(sum(bare.layers_per_block) * about) and kept not in usual.memory
    score = found.seconds["score, forward and backward"]
    assert score == pytest.approx(2 * found.seconds["log-likelihood of the video"]) and "denoiser" not in found.seconds
    assert re.search(rf"{kept} +[\d.e-]+\n +all, of 141 +{sum(found.memory.values()):.3g}", out)
    assert usual.seconds["denoiser"] > 0 and "without VAE and text encoder" in out


def test_attention_grows_with_the_square_of_a_video():
    """Half of four operations a pair of slots, channel and layer: a token sees those before it alone."""
    depth, width, step = TINY.layers_per_block[-1], TINY.deep_width, 2 * 3
    work = InfoConfig(
        "tiny", rows=1, columns=3, dtype="float32", guided=False, tflops=1e-12, share=1.0
    )  # seconds are operations
    names = ("log-likelihood of the video", "deep block, token by token")
    for name in names:
        few, some, many = (plan(TINY, replace(work, frames=frames)).seconds[name] for frames in (4, 6, 8))
        assert few - 2 * some + many == pytest.approx(2 * depth * width * 2 * step**2)


def test_the_plan_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    work = InfoConfig(str(tmp_path), frames=4, rows=1, columns=3, batch=2, guided=False, dtype="float32")
    found = info(work)
    flow = ReleasedFlow(TINY)
    assert found.memory["weights"] * 1e9 == 4 * sum(p.numel() for p in flow.parameters())
    cache = flow.block(-1).new_cache(2, 3 + 4 * 3)
    assert found.memory["keys and values, deep block"] * 1e9 == cache.nbytes
    cache = flow.block(0).new_cache(2, 3)
    name = "keys and values, one shallow block, one frame"
    assert found.memory[name] * 1e9 == cache.nbytes
    guided = plan(TINY, replace(work, guided=True))
    assert guided.memory["keys and values, deep block"] == 2 * found.memory["keys and values, deep block"]
    assert all(value > 0 for value in found.seconds.values())
    with pytest.raises(ValueError, match=r"frames must be 1 .*--frames 1"):
        info(InfoConfig("starflow-3b", frames=21))
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        InfoConfig(batch=0)
