"""Training of latent codecs and of worlds on them: the commands from recording to evaluation."""

import json
from dataclasses import replace

import cv2
import pytest
import torch
from conftest import DISCRETE
from recorded import record, said
from tiny import randomised

from sfv_world.checkpoint import (
    CODEC,
    CONFIG,
    load_autoencoder,
    load_model,
    load_tensors,
    save_autoencoder,
)
from sfv_world.cli import main
from sfv_world.codec.latent import Autoencoder, AutoencoderConfig
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.training.codec import CodecTrainer, TrainCodecConfig, train_codec
from sfv_world.training.config import TrainConfig
from sfv_world.training.trainer import Trainer

SHAPE = AutoencoderConfig(16, 24, space=4, latents=3, base=16)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A recording, `data`, and a codec of it, `codec`."""
    home = tmp_path_factory.mktemp("latent")
    record(home / "data", DISCRETE, (40, 34, 36, 42, 37, 38, 35, 41))
    options = dict(space=4, latents=4, base=16, held_out=0.5, batch=8, device="cpu", ema=0.9, warmup=10)
    main_options = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    main(["train-codec", "--data", str(home / "data"), "--out", str(home / "codec"), "--steps", "150", *main_options])
    return home


def test_ctrl_c_keeps_the_codec_as_it_is(home, ctrl_c, tmp_path, monkeypatch, capsys):
    step = CodecTrainer._train_step

    def interrupted(self):
        if self.step == 2:
            ctrl_c()
        return step(self)

    monkeypatch.setattr(CodecTrainer, "_train_step", interrupted)
    config = TrainCodecConfig(home / "data", tmp_path / "codec", space=4, base=16, steps=100, device="cpu")
    with pytest.raises(KeyboardInterrupt):
        train_codec(config)
    assert f"stopped after step 3: {config.out} keeps it (--resume goes on)" in capsys.readouterr().out
    assert load_autoencoder(config.out)[1]["steps"] == 3


def test_a_codec_then_a_world_then_its_evaluation(home, capsys):
    about = json.loads((home / "codec" / CONFIG).read_text())["about"]
    assert about["held_out"]["psnr_noised"] > 20 and about["steps"] == 150
    assert cv2.imread(str(home / "codec" / "reconstructions.png")).shape == (3 * 2 * 16, 8 * 24, 3)

    train = ["train", "--data", str(home / "data"), "--out", str(home / "world"), "--codec", str(home / "codec")]
    train += ["--preset", "tiny", "--window", "3", "--clip", "4", "--held-out", "0.5", "--device", "cpu"]
    main([*train, "--steps", "2"])
    main([*train, "--steps", "4", "--resume"])
    model, about = load_model(home / "world")
    assert (about["training"]["noise"], about["training"]["patch"], about["steps"]) == (0.3, 2, 4)
    codec, _ = load_autoencoder(home / "codec")
    assert all(torch.equal(w, codec.state_dict()[n]) for n, w in model.codec.autoencoder.state_dict().items())

    (home / "codec").rename(home / "moved")  # the world needs it no more
    try:
        evaluate = [
            "evaluate",
            "--world",
            str(home / "world"),
            "--data",
            str(home / "data"),
            "--out",
            str(home / "found"),
        ]
        main([*evaluate, "--clips", "2", "--rollouts", "2", "--frames", "30", "--context", "1"])
    finally:
        (home / "moved").rename(home / "codec")
    density = json.loads((home / "found" / "results.json").read_text())["density"]
    assert density["bits_per_frame"] == pytest.approx(density["bits_per_dim"] * 4 * 6 * 4)
    assert "bits per latent" in capsys.readouterr().out
    assert "latents of 4 x 6 x 4 a frame" in (home / "found" / "README.md").read_text()


def test_training_is_seeded_and_resumes_exactly(home, tmp_path, monkeypatch):
    def saved(name):
        (shards,) = (tmp_path / name).glob("training.*/*.safetensors")
        return load_tensors(tmp_path / name / CODEC)[0] | load_tensors(shards)[0]

    options = dict(space=4, latents=2, base=16, steps=4, batch=4, validate_minutes=0.0, device="cpu")
    config = TrainCodecConfig(home / "data", tmp_path / "a", **options)
    train_codec(config)
    step = CodecTrainer._train_step

    def killed(self):
        if self.step == 2:
            raise MemoryError("killed")
        return step(self)

    parts = replace(config, out=tmp_path / "b")
    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(CodecTrainer, "_train_step", killed)
        train_codec(parts)
    assert CodecTrainer(replace(parts, resume=True)).step == 2
    train_codec(replace(parts, resume=True))
    one, other = saved("a"), saved("b")
    assert one.keys() == other.keys() and any(name.startswith("optimizer.") for name in one)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    with pytest.raises(ValueError, match=r"resume: expected the configuration of the run in .*'latents': \(2, 3\)"):
        train_codec(replace(parts, latents=3, resume=True))


def test_what_a_codec_was_trained_on_is_not_held_out_by_its_worlds(tmp_path):
    data, codec = (
        collect(CollectConfig(env="doom-basic", out=tmp_path / "data", frames=200, size=16)),
        tmp_path / "codec",
    )
    options = dict(held_out=0.3, steps=1, device="cpu")
    train_codec(TrainCodecConfig(data, codec, space=4, latents=2, base=16, episodes=4, **options))
    config = TrainConfig(data, tmp_path / "world", codec=codec, preset="tiny", clip=4, window=3, **options)
    first = Trainer(config)
    assert first.config.episodes == 4 and first.later > 0
    with pytest.raises(
        ValueError, match=r"codec: expected the split .* --episodes 4, got --seed 1 .*Give these options"
    ):
        Trainer(replace(config, seed=1))
    first.save({})
    both = replace(config, init=config.out, out=tmp_path / "both")
    assert Trainer(both).config.episodes == 4
    said(config.out, training={"seed": 0, "held_out": 0.3, "episodes": 5})
    with pytest.raises(
        ValueError, match=r"init: expected the split that codec was trained with .* 4, got .* 5: each knows"
    ):
        Trainer(both)


# Mistakes


def test_a_codec_is_trained_by_one_process(home, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"train-codec: expected one process, got 2. Start it without torchrun"):
        train_codec(TrainCodecConfig(home / "data", tmp_path / "codec", steps=1, device="cpu"))
    assert not (tmp_path / "codec").exists()


def test_codecs_that_do_not_fit(home, tmp_path):
    config = TrainConfig(home / "data", tmp_path / "world", preset="tiny", steps=1, device="cpu")
    wide = tmp_path / "wide"
    save_autoencoder(wide, Autoencoder(AutoencoderConfig(32, 32, space=4, latents=2, base=16)))
    with pytest.raises(ValueError, match=r"codec: expected one of frames of 16 x 24.*got one of 32 x 32.*train-codec"):
        Trainer(replace(config, codec=wide))
    for patch in (3, 0, -2):
        message = f"patch must divide the latents' rows and columns, got patch {patch} for 4 x 6"
        with pytest.raises(ValueError, match=message):
            Trainer(replace(config, codec=home / "codec", patch=patch))
    with pytest.raises(ValueError, match=r"steps, minutes: expected at least one"):
        TrainCodecConfig(home / "data", tmp_path)
    again = TrainCodecConfig(home / "data", home / "codec", steps=1, device="cpu")
    with pytest.raises(ValueError, match=r"out: .*codec holds a training run. Add --resume"):
        train_codec(again)
    save_autoencoder(tmp_path / "downloaded", Autoencoder(SHAPE))
    with pytest.raises(ValueError, match=r"out: expected a folder without a codec.*found codec.safetensors"):
        train_codec(replace(again, out=tmp_path / "downloaded"))


def test_a_world_goes_on_with_its_own_codec_only(home, tmp_path):
    config = TrainConfig(home / "data", tmp_path / "a", codec=home / "codec", preset="tiny", steps=1, device="cpu")
    first = Trainer(config)
    first.save({})
    second = Trainer(replace(config, out=tmp_path / "b", init=tmp_path / "a")).model.state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.averaged.state_dict().items())
    other, _ = load_autoencoder(home / "codec")
    save_autoencoder(tmp_path / "other", randomised(other))
    with pytest.raises(ValueError, match=r"init: expected a world of the codec.*Choose the codec it has"):
        Trainer(replace(config, out=tmp_path / "c", init=tmp_path / "a", codec=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"init: expected a world of this one.s shape.*codec.patch 2 \(here 8\)"):
        Trainer(replace(config, out=tmp_path / "c", init=tmp_path / "a", codec=None))
