"""`sfv-world generate` at a tiny size: films and pictures, continued images, and what is told before anything is loaded."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import av
import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
from released import TINY, close
from test_text import LENGTH, save_encoder
from test_vae import image_vae, wan_vae
from tiny import randomised
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import sfv_world.generate as generating
from sfv_world import cli, memory
from sfv_world.checkpoint import load_tensors
from sfv_world.codec.vae import Memory, find_codec, load_codec, to_frames, to_pixels
from sfv_world.decoding.solver import SolverConfig
from sfv_world.generate import GenerateConfig, generate, needs, prepare, read_image
from sfv_world.released import ReleasedFlow, load_released, sample
from sfv_world.released.clips import ClipConfig
from sfv_world.released.convert import ConvertConfig, convert
from sfv_world.released.memory import stored_numbers
from sfv_world.released.sampling import clean
from sfv_world.released.text import format_prompt, load_text_encoder

VIDEO = replace(TINY, in_channels=4, txt_size=LENGTH, txt_dim=16)
IMAGE = replace(VIDEO, shallow_block_local=False, learnable_self_denoiser=False, patch_size=1)
SIZE = ("--height", "32", "--width", "48")


def make_world(folder, shape, vae):
    """A folder with all the parts of a released-layout world, all of them tiny and random."""
    torch.save(randomised(ReleasedFlow(shape), scale=0.05).state_dict(), folder / "tiny.pth")
    (folder / "tiny.json").write_text(json.dumps(shape.__dict__))
    world = convert(ConvertConfig(folder / "tiny.pth", folder / "world", str(folder / "tiny.json")))
    vae.save_pretrained(world / "vae")
    save_encoder(world / "text_encoder")
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world of videos; tests must not change it."""
    return make_world(tmp_path_factory.mktemp("video"), VIDEO, wan_vae())


@pytest.fixture(scope="module")
def image_world(tmp_path_factory):
    """A world of images; tests must not change it."""
    return make_world(tmp_path_factory.mktemp("image"), IMAGE, image_vae())


@pytest.fixture
def config(world, tmp_path):
    clip = ClipConfig(guidance=1.5, chunk=3, context=1, decoding=SolverConfig(block=1), seed=2)
    size, where = {"frames": 9, "height": 32, "width": 48}, {"dtype": "float32", "device": "cpu"}
    return GenerateConfig(world, tmp_path / "clip.mp4", "a cat runs", clip=clip, **size, **where)


def read_film(path):
    with av.open(str(path)) as film:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)])
        return frames, float(film.streams.video[0].average_rate)


def test_the_command_makes_a_film_that_restarts(world, tmp_path, capsys):
    out = tmp_path / "made/clip.mp4"
    options = ("--frames", "15", "--fps", "8", "--clip.chunk", "3", "--clip.context", "1", "--clip.guidance", "1.5")
    where = ("--prompts", str(tmp_path / "prompts"), "--device", "cpu", "--dtype", "float32")
    command = ["generate", "--world", str(world), "--prompt", "a cat", "--out", str(out), *SIZE, *options, *where]
    cli.main(command)
    frames, fps = read_film(out)
    assert frames.shape == (15, 32, 48, 3) and fps == 8 and frames.std() > 1
    assert os.listdir(out.parent) == ["clip.mp4"]
    kept = {load_tensors(path)[1]["prompt"] for path in (tmp_path / "prompts").iterdir()}
    prompt = "Noise Level 500:\nA video with 8 fps:\n{}\n\n in a 3:2 aspect ratio.\n"
    assert kept == {prompt.format("a cat"), prompt.format("")}
    told = capsys.readouterr()
    assert "15 frames of 32 x 48, 5 latent frames drawn, guided, so no draw" in told.out
    assert re.search(r"without guidance: -?\d+\.\d{4} nats a dimension", told.out) and "certificate" in told.out
    assert "10/10" in told.err  # five latent frames in the deep flow, and five decoded


def test_processes_that_share_the_deep_block_make_the_same_film(config, world, tmp_path):
    options = [
        "--prompt",
        config.prompt,
        "--frames",
        "9",
        "--clip.chunk",
        "3",
        "--clip.context",
        "1",
        "--clip.guidance",
        "1.5",
    ]
    options += ["--clip.seed", "2", "--clip.decoding.block", "1", "--device", "cpu", "--dtype", "float32", *SIZE]
    options += ["--prompts", str(tmp_path / "prompts"), "--world", str(world), "--out", str(tmp_path / "shared.mp4")]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "sfv_world", "generate", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("9 frames of 32 x 48, 3 latent frames drawn") == 1  # only one of them speaks
    generate(replace(config, prompts=tmp_path / "prompts"))
    (shared, _), (alone, _) = read_film(tmp_path / "shared.mp4"), read_film(config.out)
    assert np.array_equal(shared, alone)


def test_each_process_keeps_its_share_of_the_deep_block(world):
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        whole, spread = load_released(world), load_released(world, spread=True)
    finally:
        dist.destroy_process_group()
    deep = f"blocks.{len(whole.blocks) - 1}.attn_blocks."
    for (name, mine), theirs in zip(spread.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(mine, DTensor) == name.startswith(deep)
        if isinstance(mine, DTensor):
            assert torch.equal(mine.to_local(), theirs.chunk(2)[1])


def test_layers_that_are_shared_are_whole_only_while_they_are_used(world):
    script = """
import sys, torch
from torch.distributed.tensor import DTensor
from sfv_world.released import load_released, sample
from sfv_world.training.distributed import joined
with joined("cpu"):
    flow = load_released(sys.argv[1], spread=True).requires_grad_(False)
    text = torch.zeros(1, flow.config.txt_size, flow.config.txt_dim)
    shared = lambda: [isinstance(parameter, DTensor) for parameter in flow.block(-1).attn_blocks.parameters()]
    tokens = sample(flow, torch.zeros(1, 2, 1, flow.config.token_channels), text, (1, 1)).tokens.requires_grad_()
    assert all(shared()), shared()
    log_prob = flow(tokens, text, (1, 1)).log_prob.sum()
    assert all(shared()), shared()
    torch.autograd.grad(log_prob, tokens)  # as the score does that cleans
    assert all(shared()), shared()
"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run(
        [*torchrun, sys.executable, "-c", script, str(world)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


@torch.no_grad()
def test_a_film_is_the_parts_one_after_the_other(config, world, tmp_path):
    config = replace(config, prompts=tmp_path / "prompts", fps=8)
    clip = generate(config)
    flow, codec = load_released(world), load_codec(world / "vae")
    prompts = [format_prompt(caption, 0.5, 32, 48, 8) for caption in ("a cat runs", "")]
    text = load_text_encoder(world / "text_encoder", LENGTH)(prompts)
    generator = torch.Generator().manual_seed(2)
    noise = torch.stack([torch.randn(1, 6, 16, generator=generator) for _ in range(3)], dim=1)
    drawn = sample(flow, noise, text[:1], (2, 3), unconditional=text[1:], guidance=1.5)
    close(clip.tokens, drawn.tokens, atol=1e-3)
    swapped = sample(flow, noise, text[1:], (2, 3), unconditional=text[:1], guidance=1.5)
    assert (swapped.tokens - drawn.tokens).abs().max() > 0.01
    frames = to_frames(codec.decode(flow.latents(clean(flow, drawn.tokens, text[:1], (2, 3), 0.5), (2, 3))))
    assert (clip.frames.int() - frames.int()).abs().max() <= 2
    film, fps = read_film(config.out)
    # H.264 halves the resolution of colour and rounds; the pictures are the same.
    pairs = zip(film.mean(-1), clip.frames[0].float().mean(-1).numpy(), strict=True)
    assert fps == 8 and min(np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs) > 0.8


def test_a_film_begins_with_the_image(config, world, tmp_path):
    picture = np.random.default_rng(0).integers(256, size=(4, 6, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    cv2.imwrite(str(tmp_path / "start.png"), picture[..., ::-1])
    config = replace(config, image=tmp_path / "start.png", prompts=tmp_path / "prompts", frames=7)
    clip = generate(config)
    assert clip.log_prob.shape == (1, 2, 6) and read_film(config.out)[0].shape == (7, 32, 48, 3)
    image = read_image(config.image, 32, 48)
    assert np.array_equal(image.numpy(), picture[::2, ::2])
    codec = load_codec(world / "vae")
    shown = to_frames(codec.decode(codec.encode(to_pixels(image[None, None]))))
    assert torch.equal(clip.frames[:, :1], shown)
    other = generate(replace(config, image=None))
    assert not torch.equal(other.tokens[:, 1], clip.tokens[:, 1])


def test_an_image_is_cut_to_the_middle(tmp_path):
    picture = np.zeros((10, 40, 3), np.uint8)
    picture[:, 15:25] = [250, 100, 0]
    cv2.imwrite(str(tmp_path / "wide.png"), picture[..., ::-1])
    found = read_image(tmp_path / "wide.png", 20, 20).float().mean((0, 1))
    close(found, torch.tensor([250.0, 100.0, 0.0]), atol=10)


def test_a_model_of_images_makes_a_picture(image_world, tmp_path, capsys):
    out = tmp_path / "a.png"
    where = ("--prompts", str(tmp_path / "prompts"), "--device", "cpu", "--dtype", "float32", "--out", str(out))
    cli.main(["generate", "--world", str(image_world), "--prompt", "a dog", "--height", "8", "--width", "8", *where])
    assert cv2.imread(str(out)).shape == (8, 8, 3) and cv2.imread(str(out)).std() > 1
    assert "1 latent frames drawn" in capsys.readouterr().out
    for extra, expected in ((("--frames", "2"), "got 2 frames"), (("--image", "start.png"), "got the image start.png")):
        with pytest.raises(SystemExit):
            cli.main(["generate", "--world", str(image_world), "--height", "8", "--width", "8", *where, *extra])
        assert f"of a model of images, {expected}" in capsys.readouterr().err


def test_no_caption_is_no_guidance_and_known_prompts_need_no_encoder(config, tmp_path, monkeypatch):
    config = replace(config, prompt="", prompts=tmp_path / "prompts", frames=1)
    assert not generate(config).guided and len(os.listdir(tmp_path / "prompts")) == 1
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert not generate(config).guided
    with pytest.raises(ImportError, match=r"transformers: .*pip install -e \"\.\[released\]\""):
        generate(replace(config, prompt="a dog"))


def largest_activation(codec, height, width):
    """Bytes of the largest tensor that a layer makes while a group of frames is decoded."""
    sizes, memory = [], Memory()
    for layer in codec.vae.modules():
        layer.register_forward_hook(
            lambda layer, given, made: sizes.append(made.nbytes if hasattr(made, "nbytes") else 0)
        )
    for _ in range(2):
        codec.decode(torch.zeros(1, 1, codec.channels, height // codec.space, width // codec.space), memory)
    return max(sizes)


def test_memory_is_counted_before_loading(config, world, monkeypatch):
    job = prepare(config)
    counted, shared = ({need.what: need.size for need in needs(config, job, devices)} for devices in (1, 2))
    flow = load_released(world)
    assert counted["VAE"] == sum(p.numel() * 4 for p in wan_vae().parameters())
    assert counted["its activations"] > 2 * largest_activation(load_codec(world / "vae"), 32, 48)
    assert counted["weights"] == sum(p.numel() * 4 for p in flow.parameters())
    assert counted["weights"] - shared["weights"] == sum(p.numel() * 2 for p in flow.block(-1).parameters())
    encoder = save_encoder(world.parent / "again")
    assert stored_numbers(world / "text_encoder") == sum(p.numel() for p in encoder.parameters())
    assert stored_numbers(world / "text_encoder", ("nothing",)) == 0
    bare = needs(config, replace(job, shape=replace(job.shape, learnable_self_denoiser=False)))
    layers = sum(job.shape.layers_per_block)
    about = counted["activations of a parallel pass, about"]
    assert next(need.size for need in bare if "score" in need.what) == pytest.approx(layers * about)
    # The cache of guided sampling is that of two sequences.
    plain = needs(config, replace(job, clip=replace(job.clip, guidance=0.0)))
    name = "keys and values, deep block"
    assert counted[name] == 2 * next(need.size for need in plain if need.what == name)

    def loaded(*arguments):
        raise AssertionError("something was loaded")

    for name in ("load_codec", "load_released"):
        monkeypatch.setattr(generating, name, loaded)
    monkeypatch.setattr(memory, "available", lambda device: sum(counted.values()) - 1)
    with pytest.raises(
        ValueError, match=r"memory: expected about 0.00 GB free on cpu \(weights 0.00, .*VAE 0.00.*got .*--clip.chunk"
    ):
        generate(config)
    assert not (world / "prompts").exists() and not config.out.exists()


def test_available_memory_is_that_of_the_system():
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < memory.available(torch.device("cpu")) <= pages


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"out": "clip.gif"}, r"out: expected a .mp4 file, since this is a model of videos, got clip.gif"),
        (
            {"out": "other/config.json/clip.mp4"},
            r"out: expected a folder that can be written to, got other/config.json: .*",
        ),
        (
            {"prompts": "other/config.json"},
            r"prompts: expected a folder that can be written to, got other/config.json: ",
        ),
        ({"image": "none.png", "frames": 1}, r"frames: expected at least 2 with an image to begin with, got 1"),
        ({"height": 40}, r"height, width: expected multiples of 16 pixels, got 40 x 48"),
        ({"image": "none.png"}, r"image: expected a picture .*got none.png"),
        ({"vae": "image/vae"}, r"vae: expected latents of 4 channels, got a VAE of 3"),
        ({"vae": "nowhere"}, r"nowhere: expected the folder of a VAE"),
        ({"text_encoder": "wide"}, r"text_encoder: expected states of 16 channels, got 7"),
        ({"world": "."}, r"expected the folder of a converted model"),
        ({"world": "other"}, r"world: expected a folder made by `sfv-world convert`.*sfv-world demo"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(config, tmp_path, monkeypatch, change, expected):
    monkeypatch.chdir(tmp_path)
    wan_vae(z_dim=3, latents_mean=[0.0] * 3, latents_std=[1.0] * 3).save_pretrained("image/vae")
    for name, values in (("wide", {"d_model": 7}), ("other", {"format": 1})):
        os.mkdir(name)
        (tmp_path / name / "config.json").write_text(json.dumps(values))
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(generating, "load_released", lambda *arguments: pytest.fail("loaded"))
    named = {name: type(getattr(config, name) or config.out)(value) for name, value in change.items()}
    with pytest.raises(ValueError, match=expected):
        generate(replace(config, **named))
    assert not (tmp_path / "clip.mp4").exists()


def test_numbers_out_of_range_are_told(config, capsys):
    for name in ("height", "width", "frames", "fps"):
        with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
            replace(config, **{name: 0})
    with pytest.raises(SystemExit):
        cli.main(["generate", "--world", "none", "--out", "none.mp4", "--clip.seed", "9" * 23])
    assert "seed: expected 0 to 2**32 - 1" in capsys.readouterr().err


def test_a_codecs_shape_takes_no_weights(world, tmp_path):
    codec = find_codec(world / "vae")
    assert (codec.channels, codec.space, codec.time) == (4, 8, 4)
    assert all(parameter.is_meta for parameter in codec.parameters())
    config = json.loads((world / "vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim_mult": None}))
    (tmp_path / "x.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="expected the configuration of an AutoencoderKLWan"):
        find_codec(tmp_path)
