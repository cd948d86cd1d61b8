"""Reading and converting checkpoints of the released layout, those that cannot be trusted too."""

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from released import TINY, VIDEO, close
from safetensors.torch import load_file
from tiny import randomised

from sfv_world import cli
from sfv_world.released import ReleasedFlow, load_released, sample
from sfv_world.released import convert as converting
from sfv_world.released.config import find_config
from sfv_world.released.convert import ConvertConfig, convert, split


def test_converting_changes_nothing_and_holds_one_shard(tmp_path, monkeypatch, capsys):
    written = []
    save = converting.save_tensors

    def spy(path, tensors, metadata):
        written.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(path, tensors, metadata)

    monkeypatch.setattr(converting, "save_tensors", spy)
    cli.main(["convert", str(VIDEO / "checkpoint.pth"), "--out", str(tmp_path / "made"), "--shard-megabytes", "1"])
    expected, made = load_released(VIDEO / "checkpoint.pth"), load_released(tmp_path / "made")
    assert made.config == expected.config == find_config(tmp_path / "made")
    assert expected.state_dict().keys() == made.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    assert max(written) <= 2**20 and len(written) > 12
    index = json.loads((tmp_path / "made/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(written)
    files = {"config.json", "model.safetensors.index.json", *index["weight_map"].values()}
    assert files == set(os.listdir(tmp_path / "made")) and len(files) == 2 + len(written)
    assert os.listdir(tmp_path) == ["made"]
    out = capsys.readouterr().out
    assert "3,296,936 parameters" in out and "blocks.3.attn_mask" in out and "var" in out


def test_converting_into_the_empty_folder_that_one_is_in(tmp_path, monkeypatch):
    flow = randomised(ReleasedFlow(TINY))
    torch.save(flow.state_dict(), tmp_path / "tiny.pth")
    (tmp_path / "tiny.json").write_text(json.dumps(TINY.__dict__))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(ConvertConfig(tmp_path / "tiny.pth", Path("."), str(tmp_path / "tiny.json")))
    assert load_released(tmp_path / "here").config == TINY


def test_shards_keep_order_and_limit():
    sizes = {"a": 3, "b": 4, "c": 9, "d": 1, "e": 2}
    assert list(split(sizes, 7)) == [["a", "b"], ["c"], ["d", "e"]]


@torch.no_grad()
def test_lower_precision_is_of_the_layers_alone():
    flow = load_released(VIDEO / "checkpoint.pth", dtype=torch.bfloat16)
    for name, parameter in flow.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if ".attn_blocks." in name else torch.float32)
    tensors = load_file(VIDEO / "tensors.safetensors")
    tokens, grid = flow.tokens(tensors["x"]), (3, 4)
    encoding = flow(tokens, tensors["text"], grid)
    assert encoding.noise.dtype == encoding.log_det.dtype == torch.float32
    close(flow.latents(encoding.noise, grid), tensors["z"], atol=0.5)
    assert (flow.latents(encoding.noise, grid) - tensors["z"]).abs().mean() < 0.02
    assert sample(flow, tokens[:, :1], tensors["text"], grid).tokens.isfinite().all()
    assert flow.denoise(tokens, tensors["text"], grid).dtype == torch.float32


class RunsCode:
    """What a pickle that wants to run code looks like."""

    def __reduce__(self):
        return os.mkdir, ("was-run",)


@pytest.fixture
def state():
    """A correct state dict of the tiny model and its configuration."""
    flow = ReleasedFlow(TINY)
    return flow.state_dict()


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(state, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({**state, "extra": RunsCode()}, "bad.pth", _use_new_zipfile_serialization=zipped)
    expected = r"bad.pth: expected a state dict of tensors alone.*mkdir.*not run" if zipped else "bad.pth.*zip format"
    for read in (lambda: load_released("bad.pth", TINY), lambda: convert(ConvertConfig(Path("bad.pth"), Path("out")))):
        with pytest.raises(ValueError, match=expected):
            read()
    assert os.listdir() == ["bad.pth"]


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize("made", [lambda path: path, lambda path: convert(ConvertConfig(path, path.parent / "made"))])
def test_what_is_left_out_may_be_anything(state, tmp_path, capsys, made):
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    others = {"blocks.0.attn_mask": mask, "var": None, "blocks.1.feat_rope.freqs_cis": mask * 1j}
    torch.save({**state, **others}, tmp_path / "tiny.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    found = load_released(made(tmp_path / "tiny.pth")).state_dict()
    assert found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())
    told = capsys.readouterr().out
    assert not told or told.endswith("only: blocks.0.attn_mask, blocks.1.feat_rope.freqs_cis\n")


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: without(s, "blocks.1.sos_embed"), r"1 missing \(blocks.1.sos_embed\)"),
        (lambda s: {**s, "blocks.9.proj_in.weight": torch.zeros(1)}, r"1 unknown \(blocks.9.proj_in.weight\)"),
        (
            lambda s: {**s, "blocks.0.proj_in.bias": torch.zeros(7)},
            r"blocks.0.proj_in.bias: expected \(32,\), got \(7,\).*--config",
        ),
        (lambda s: {"model": s}, "flat state dict .*got OrderedDict as 'model'.*save that entry alone"),
        (lambda s: {**s, "step": torch.tensor(3)}, "got a tensor of torch.int64 as 'step'"),
        (lambda s: {**s, "x": torch.zeros(2).to_sparse()}, "got Tensor as 'x'"),
        (lambda s: list(s.values()), "expected a flat state dict .*got list"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_nothing(state, tmp_path, change, expected):
    torch.save(change(state), tmp_path / "bad.pth")
    (tmp_path / "tiny.json").write_text(json.dumps(asdict(TINY)))
    with pytest.raises(ValueError, match=expected):
        load_released(tmp_path / "bad.pth", TINY)
    with pytest.raises(ValueError, match=expected):
        convert(ConvertConfig(tmp_path / "bad.pth", tmp_path / "a/out", str(tmp_path / "tiny.json")))
    assert sorted(os.listdir(tmp_path)) == ["bad.pth", "tiny.json"]


def test_the_wrong_configuration_is_told(state, tmp_path):
    torch.save(state, tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"those of no preset .*starflow-v-7b.*config.json"):
        load_released(tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match=r"do not fit configuration starflow-3b; \d+ missing .* unknown .* of another"):
        load_released(tmp_path / "tiny.pth", "starflow-3b")
    with pytest.raises(ValueError, match=r"do not fit the configuration given"):
        load_released(tmp_path / "tiny.pth", replace(TINY, layers_per_block=(1, 1, 3)))


def test_damaged_files_are_told(state, tmp_path, monkeypatch):
    whole = tmp_path / "tiny.pth"
    torch.save(state, whole)
    (tmp_path / "cut.pth").write_bytes(whole.read_bytes()[:20_000])
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    for name in ("cut.pth", "text.pth"):
        with pytest.raises(ValueError, match=f"{name}: expected a state dict in the zip format.*again"):
            load_released(tmp_path / name, TINY)
    with pytest.raises(ValueError, match=r"none.pth: expected a checkpoint, found no such file"):
        load_released(tmp_path / "none.pth", TINY)
    with pytest.raises(ValueError, match=r"expected a checkpoint, a file"):
        convert(ConvertConfig(tmp_path, tmp_path / "out"))
    with pytest.raises(ValueError, match=r"found no model.safetensors.index.json.*sfv-world convert"):
        load_released(tmp_path, TINY)
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    made = convert(ConvertConfig(whole, tmp_path / "made"))
    shard = next(made.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"complete shards, got files that cannot be read"):
        load_released(made)
    shard.unlink()
    with pytest.raises(ValueError, match="found no model-00001-of-00001.safetensors"):
        load_released(made)
    (made / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="cannot be read"):
        load_released(made)


@pytest.mark.parametrize("checksums", [True, False])
def test_weights_that_changed_since_they_were_saved_are_told(state, tmp_path, checksums):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    try:
        torch.save(state, tmp_path / "tiny.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    convert(ConvertConfig(tmp_path / "tiny.pth", tmp_path / "made"))
    if not checksums:
        return
    whole = (tmp_path / "tiny.pth").read_bytes()
    weights = state["blocks.2.attn_blocks.0.attention.qkv.weight"].numpy().tobytes()
    place = whole.index(weights)
    (tmp_path / "tiny.pth").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ValueError, match=r"tiny.pth: expected what was saved, got .*record tiny/data/\d+ .*Copy"):
        convert(ConvertConfig(tmp_path / "tiny.pth", tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "made", "tiny.pth"]


def test_weights_that_are_not_finite_are_told(state, tmp_path):
    state["blocks.1.sos_embed"][0, 0, 1] = torch.nan
    torch.save(state, tmp_path / "tiny.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    with pytest.raises(ValueError, match=r"expected finite weights, got 1 of \d+ in blocks.1.sos_embed"):
        convert(ConvertConfig(tmp_path / "tiny.pth", tmp_path / "out"))
    assert sorted(os.listdir(tmp_path)) == ["config.json", "tiny.pth"]


def test_a_conversion_that_fails_leaves_nothing(state, tmp_path, monkeypatch):
    torch.save(state, tmp_path / "tiny.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    before = sorted(os.listdir(tmp_path))
    config = ConvertConfig(tmp_path / "tiny.pth", tmp_path / "out")

    def full(path, tensors, metadata):
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(converting, "save_tensors", full)
        convert(config)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"expected room for [\d,]+ bytes, got 10 free"),
    ):
        patch.setattr(converting.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        convert(config)
    assert sorted(os.listdir(tmp_path)) == before
    with pytest.raises(ValueError, match="shard_megabytes must be at least 1, got 0"):
        convert(replace(config, shard_megabytes=0))
    convert(config)
    with pytest.raises(ValueError, match=r"out: expected a folder to make, found one .*Remove it"):
        convert(config)
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])


def test_a_conversion_removes_what_a_killed_one_left(state, tmp_path):
    torch.save(state, tmp_path / "tiny.pth")
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    with subprocess.Popen(["true"]) as ended:
        pass
    left, again = (tmp_path / f".out[1].{number}" for number in (ended.pid, os.getpid()))  # numbers come again
    running = os.getppid()
    others = [f".out[1].{running}", ".out[1].kept", f".out[1].more.{ended.pid}", f".out1.{ended.pid}"]
    for folder in (left, again, *(tmp_path / name for name in others)):
        folder.mkdir()
        (folder / "model-00001-of-00002.safetensors").write_bytes(b"half")
    convert(ConvertConfig(tmp_path / "tiny.pth", tmp_path / "out[1]"))
    assert sorted(os.listdir(tmp_path)) == sorted(["tiny.pth", "config.json", "out[1]", *others])


def test_the_command_tells_a_users_mistake_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sfv-world: ") and "none.pth" in error and error.count("\n") == 1
