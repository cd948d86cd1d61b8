"""The released layout: the reference tensors, the laws behind them, reading what cannot be trusted, and the full sizes."""

import json
import math
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import normal, randomised

from sfv_world import cli
from sfv_world.flow.affine import Fields
from sfv_world.released import PRESETS, ReleasedConfig, ReleasedFlow, load_released, sample
from sfv_world.released import convert as converting
from sfv_world.released.config import FIXED, find_config
from sfv_world.released.convert import ConvertConfig, convert, split
from sfv_world.released.load import expected_shapes, open_checkpoint
from sfv_world.released.model import attend_to_frames
from sfv_world.released.plan import InfoConfig, info, parameter_counts, plan
from sfv_world.released.sampling import guide

REFERENCE = Path(__file__).parent / "reference"
VIDEO, IMAGE = REFERENCE / "starflow_v_tiny", REFERENCE / "starflow_tiny"


def close(actual, expected, atol=1e-4):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# The reference -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[VIDEO, IMAGE], ids=["video", "image"])
def reference(request):
    """A reference model with its tensors: latents with a time axis, and tokens."""
    tensors = load_file(request.param / "tensors.safetensors")
    flow = load_released(request.param / "checkpoint.pth")

    def latents(name):
        return tensors[name] if request.param == VIDEO else tensors[name][:, None]

    grid = tuple(tensors["x"].shape[-2:])
    guidance = json.loads((request.param / "config.json").read_text())["guidance"]
    return SimpleNamespace(
        flow=flow, tensors=tensors, latents=latents, grid=grid, guidance=guidance, text=tensors["text"],
        x=flow.tokens(latents("x")), noise=flow.tokens(latents("noise")),
    )  # fmt: skip


@torch.no_grad()
def test_every_block_is_that_of_the_reference(reference):
    flow, tensors, x = reference.flow, reference.tensors, reference.x
    stages, _ = flow.stages(x, reference.text, reference.grid)
    assert len(stages) == 4
    for index, stage in enumerate(stages):
        activation = flow.orient(index, stage.tokens.reshape(x.shape))
        close(activation.flatten(), tensors[f"activation.{index}"].flatten())
        close(-stage.fields.sigma.log().flatten(), tensors[f"logdet.{index}"].flatten())


@torch.no_grad()
def test_noise_and_log_likelihood_are_those_of_the_reference(reference):
    flow = reference.flow
    encoding = flow(reference.x, reference.text, reference.grid)
    close(flow.latents(encoding.noise, reference.grid), reference.latents("z"))
    close(encoding.noise.flatten(), reference.tensors["activation.4"].flatten())
    close(encoding.latents.flatten(), reference.tensors["activation.3"].flatten())
    log_likelihood = encoding.log_prob.sum((1, 2))
    # About -1200 nats in float32: one unit in the last place is 1.2e-4.
    torch.testing.assert_close(log_likelihood, reference.tensors["log_likelihood"], rtol=5e-7, atol=1e-4)
    close(encoding.fields.normalise(encoding.latents)[0], encoding.noise, atol=0)


@torch.no_grad()
def test_denoiser_is_that_of_the_reference(reference):
    flow, given = reference.flow, (reference.x, reference.text, reference.grid)
    if "denoiser" not in reference.tensors:
        with pytest.raises(ValueError, match="learnable_self_denoiser"):
            flow.score(*given)
        return
    score = flow.score(*given)
    close(flow.latents(score, reference.grid), reference.latents("denoiser"))
    close(flow.denoise(*given), reference.x - 0.3 * score, atol=0)


def test_samples_are_those_of_the_reference(reference):
    flow, grid = reference.flow, reference.grid
    drawn = sample(flow, reference.noise, reference.text, grid)
    close(flow.latents(drawn, grid), reference.latents("sample_sequential"))
    text, unconditional = reference.tensors["text_guided"].chunk(2)
    drawn = sample(flow, reference.noise, text, grid, unconditional=unconditional, guidance=reference.guidance)
    close(flow.latents(drawn, grid), reference.latents("sample_guided"))


def test_a_continued_frame_is_that_of_the_reference(reference):
    flow, grid = reference.flow, reference.grid
    if "first_frame" not in reference.tensors:
        with pytest.raises(ValueError, match="model of images"):
            sample(flow, reference.noise, reference.text, grid, first=reference.x)
        return
    first = flow.tokens(reference.latents("first_frame"))
    drawn = sample(flow, reference.noise[:, 1:], reference.text, grid, first=first)
    close(flow.latents(drawn, grid), reference.latents("sample_from_first_frame"))
    assert torch.equal(drawn[:, :1], first)


# Laws ----------------------------------------------------------------------------------------------------------------

TINY = ReleasedConfig(
    in_channels=2, channels=32, layers_per_block=(1, 1, 2), pt_seq_len=3, txt_size=3, txt_dim=5, patch_size=2, head_dim=16,
    top_block_channels=48, shallow_block_local=True, learnable_self_denoiser=True, temporal_causal=1, denoiser_window=1,
)  # fmt: skip


@pytest.fixture(params=[(1, 1, 2), (1, 2), (1,)], ids=str)
def tiny(request):
    """Tiny models of an odd and an even number of blocks, and of one, in float64; videos of 4 frames of 1 x 3 tokens."""
    flow = randomised(ReleasedFlow(replace(TINY, layers_per_block=request.param)), scale=0.1).double().eval()
    tokens = flow.tokens(normal(2, 4, 2, 2, 6, dtype=torch.float64))
    return SimpleNamespace(flow=flow, tokens=tokens, text=normal(2, 3, 5, seed=1, dtype=torch.float64), grid=(1, 3))


@torch.no_grad()
def test_sampling_is_the_inverse_of_encoding(tiny):
    noise = tiny.flow(tiny.tokens, tiny.text, tiny.grid).noise
    close(sample(tiny.flow, noise, tiny.text, tiny.grid), tiny.tokens, atol=1e-9)
    continued = sample(tiny.flow, noise[:, 2:], tiny.text, tiny.grid, first=tiny.tokens[:, :2])
    close(continued, tiny.tokens, atol=1e-9)


def test_log_det_is_that_of_the_jacobian(tiny):
    flow, tokens, text = tiny.flow, tiny.tokens[:1, :2], tiny.text[:1]
    matrix = torch.autograd.functional.jacobian(lambda x: flow(x, text, tiny.grid).noise, tokens)
    matrix = matrix.reshape(2, tokens[0, 0].numel(), 2, -1)
    log_det = flow(tokens, text, tiny.grid).log_det
    for frame in range(2):
        close(torch.linalg.slogdet(matrix[frame, :, frame]).logabsdet, log_det[0, frame].sum(), atol=1e-9)
    assert not matrix[0, :, 1].any()


@torch.no_grad()
def test_a_row_of_many_is_that_row_alone(tiny):
    many, alone = (tiny.flow(tiny.tokens[r], tiny.text[r], tiny.grid).log_prob for r in (slice(0, 2), slice(1, 2)))
    close(many[1:], alone, atol=1e-9)
    assert not torch.equal(alone, tiny.flow(tiny.tokens[1:], tiny.text[:1], tiny.grid).log_prob)


def test_tokens_and_latents_are_inverse():
    flow, latents = ReleasedFlow(TINY), normal(2, 3, 2, 4, 6)
    assert torch.equal(flow.latents(flow.tokens(latents), (2, 3)), latents)
    assert torch.equal(flow.tokens(latents)[0, 0, 1, :4], latents[0, 0, :, 0, 2:4].T.flatten())


@torch.no_grad()
def test_guidance():
    generator = torch.Generator().manual_seed(0)
    mu, sigma, mu_u, sigma_u = (0.1 + torch.rand(50, 3, generator=generator) for _ in range(4))
    conditional, unconditional = Fields(mu, sigma), Fields(mu_u, sigma_u)
    for field, expected in zip(guide(conditional, unconditional, 0.0), conditional, strict=True):
        close(field, expected, atol=1e-6)
    for field, expected in zip(guide(conditional, conditional, 3.0), conditional, strict=True):
        close(field, expected, atol=1e-5)
    # Where the conditional is the sharper one, it is the product of the densities p_c^(1+w) / p_u^w.
    sharper, w = sigma < sigma_u, 1.7
    guided = guide(conditional, unconditional, w)
    precision = (1 + w) / sigma**2 - w / sigma_u**2
    mean = ((1 + w) * mu / sigma**2 - w * mu_u / sigma_u**2) / precision
    close(guided.sigma[sharper], precision.rsqrt()[sharper], atol=1e-5)
    close(guided.mu[sharper], mean[sharper], atol=1e-4)


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("window", [1, 2, 10])
def test_the_denoisers_attention_is_that_of_its_mask(ahead, window):
    text, frames, slots = 2, 4, 3
    q, k, v = normal(3, 2, 1, text + frames * slots, 16)
    frame = torch.cat([torch.full((text,), -1), torch.arange(frames).repeat_interleave(slots)])
    last = frame.clamp(min=0)[:, None] + ahead - 1
    mask = (frame <= last) & (frame >= last - window) | (frame == -1)
    expected = F.scaled_dot_product_attention(q, k, v, mask if ahead else None)
    close(attend_to_frames(q, k, v, text=text, frames=frames, ahead=ahead, window=window), expected, atol=1e-6)


# Reading, converting -------------------------------------------------------------------------------------------------


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
    assert sample(flow, tokens[:, :1], tensors["text"], grid).isfinite().all()
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


def test_the_command_tells_a_users_mistake_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(tmp_path / "none.pth"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("sfv-world: ") and "none.pth" in error and error.count("\n") == 1


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


def test_shapes_that_do_not_fit_are_told():
    flow, text = ReleasedFlow(TINY), torch.zeros(2, 3, 5)
    with pytest.raises(ValueError, match=r"tokens must have the shape \(batch, frames, 4, 8\) for grid \(2, 2\)"):
        flow(torch.zeros(2, 1, 3, 8), text, (2, 2))
    with pytest.raises(ValueError, match=r"text must have the shape \(2, 3, 5\), got \(2, 2, 5\)"):
        flow.denoise(torch.zeros(2, 1, 4, 8), text[:, :2], (2, 2))
    with pytest.raises(ValueError, match="guidance 2.0 needs"):
        sample(flow, torch.zeros(2, 1, 4, 8), text, (2, 2), guidance=2.0)
    image = ReleasedFlow(replace(TINY, shallow_block_local=False))
    with pytest.raises(ValueError, match="of one frame, since this is a model of images; got 2 frames"):
        image(torch.zeros(2, 2, 4, 8), text, (2, 2))


# Full size -----------------------------------------------------------------------------------------------------------

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
    assert re.search(r"weights +13\.8\n", out) and re.search(r"deep block, token by token +\d+\.\d\d\n", out)
    cli.main(["info", "starflow-3b", "--frames", "1", "--rows", "32", "--columns", "32", "--memory", "4"])
    assert "does not fit" in capsys.readouterr().out


def test_the_plan_counts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(asdict(TINY)))
    work = InfoConfig(str(tmp_path), frames=4, rows=1, columns=3, batch=2, guided=False, dtype="float32")
    found = info(work)
    flow = ReleasedFlow(TINY)
    assert found.memory["weights"] * 1e9 == 4 * sum(p.numel() for p in flow.parameters())
    cache = flow.block(-1).new_cache(2, 3 + 4 * 3)
    assert found.memory["keys and values, deep block"] * 1e9 == cache.keys.nbytes + cache.values.nbytes
    cache = flow.block(0).new_cache(2 * 4, 3)
    name = "keys and values, one shallow block, all frames"
    assert found.memory[name] * 1e9 == cache.keys.nbytes + cache.values.nbytes
    guided = plan(TINY, replace(work, guided=True))
    assert guided.memory["keys and values, deep block"] == 2 * found.memory["keys and values, deep block"]
    assert all(value > 0 for value in found.seconds.values())
    with pytest.raises(ValueError, match=r"frames must be 1 .*--frames 1"):
        info(InfoConfig("starflow-3b"))
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        InfoConfig(batch=0)
