"""Training: it learns, resumes exactly, and a run that goes wrong leaves the last good checkpoint."""

from dataclasses import replace

import pytest
import torch
from tiny import normal

from sfv_world.checkpoint import MODEL, load_model, load_tensors
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.training import trainer
from sfv_world.training.config import TrainConfig
from sfv_world.training.objective import ObjectiveConfig
from sfv_world.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "doom"
    return collect(CollectConfig(env="doom-basic", out=out, frames=200, size=16))


@pytest.fixture
def config(recording, tmp_path):
    return TrainConfig(
        data=recording,
        out=tmp_path / "run",
        preset="tiny",
        steps=6,
        patch=8,
        clip=4,
        window=3,
        held_out=0.3,
        device="cpu",
    )


def tensors(config):
    (shards,) = config.out.glob("training.*/*.safetensors")
    return load_tensors(shards)[0] | {f"world.{k}": v for k, v in load_tensors(config.out / MODEL)[0].items()}


def files(config):
    """What a run leaves but for the record of how it went."""
    kept = (path for path in config.out.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    return {path: path.read_bytes() for path in kept}


def test_training_learns(config):
    config = replace(config, ema=0.9)
    before = Trainer(config).validate()
    after = train(replace(config, steps=40))
    assert after["nats_per_dim"] < before["nats_per_dim"] - 0.05
    assert after["reward_loss"] < before["reward_loss"]
    assert (config.out / "samples").exists()


def test_a_killed_run_resumes_exactly(config, monkeypatch, tmp_path):
    whole = replace(config, out=tmp_path / "whole")
    train(whole)

    every_step = replace(config, validate_minutes=0.0)
    monkeypatch.setattr(Trainer, "_sample", lambda self: None)
    real_step = Trainer._train_step

    def killed(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return real_step(self)

    monkeypatch.setattr(Trainer, "_train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        train(every_step)
    monkeypatch.setattr(Trainer, "_train_step", real_step)
    resumed = Trainer(replace(every_step, resume=True))
    assert resumed.step == 3
    resumed.run()
    expected, found = tensors(whole), tensors(config)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_a_loss_that_is_not_finite_leaves_the_last_good_checkpoint(config, monkeypatch):
    train(config)
    good = files(config)
    real_loss = trainer.world_loss

    def poisoned(*arguments):
        loss = real_loss(*arguments)
        return loss._replace(value=loss.value * float("nan"))

    monkeypatch.setattr(trainer, "world_loss", poisoned)
    with pytest.raises(FloatingPointError, match=r"last good checkpoint.*--resume"):
        train(replace(config, steps=12, resume=True))
    assert good == files(config)


def test_a_full_disk_leaves_the_last_good_checkpoint(config, monkeypatch):
    train(config)
    good = files(config)

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sfv_world.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(replace(config, steps=7, resume=True))
    assert good == files(config)


def test_the_world_is_the_moving_average(config):
    run = Trainer(config)
    run.run()
    model, about = load_model(config.out)
    assert about["steps"] == 6
    for name, tensor in run.averaged.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert any(not torch.equal(tensor, model.state_dict()[name]) for name, tensor in run.model.state_dict().items())


def test_a_run_can_start_from_a_world(config, tmp_path):
    train(config)
    second = Trainer(replace(config, init=config.out, out=tmp_path / "second"))
    for name, tensor in load_model(config.out)[0].state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor)
    other = Trainer(replace(config, init=config.out, out=tmp_path / "other", bands=2)).model.state_dict()
    for name, tensor in second.model.state_dict().items():
        assert name.startswith("flow.shallow.") or torch.equal(tensor, other[name]), name
    for change in ({"window": 2}, {"denoiser": False}):
        begun = Trainer(replace(config, init=config.out, out=tmp_path / "changed", **change)).model.state_dict()
        assert len(begun) > 50
        for name, tensor in begun.items():
            assert torch.equal(second.model.state_dict()[name], tensor), name
    with pytest.raises(ValueError, match=r"init: expected a world of the shape.*noise=0.1"):
        Trainer(replace(config, init=config.out, out=tmp_path / "third", noise=0.1))


def test_a_band_that_is_cut_begins_as_the_whole_one(config, tmp_path):
    """Its first part knows what the whole one knew, and so do all other bands; curves begin straight."""
    train(config)
    whole = Trainer(replace(config, init=config.out, out=tmp_path / "whole")).model.flow
    cut = Trainer(replace(config, init=config.out, out=tmp_path / "cut", bins=4)).model.flow
    assert cut.config.bands == (1, 2, whole.config.bands[0] - 3, *whole.config.bands[1:])
    tokens, condition = normal(2, whole.config.tokens, 192), normal(2, whole.config.tokens, 96, seed=1)
    with torch.no_grad():
        before, after = (flow.shallow(tokens, condition)[0] for flow in (whole, cut))
    rest = [0, *range(whole.config.bands[0], 192)]
    torch.testing.assert_close(after[..., rest], before[..., rest], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after[..., 1:3], before[..., 1:3])


@pytest.mark.parametrize("kind", ["frame-parallel", "autoregressive"])
def test_minutes_end_a_run(config, kind):
    run = Trainer(replace(config, kind=kind, steps=None, minutes=0.005))
    run.run()
    assert run.elapsed >= 0.3
    assert (config.out / MODEL).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(steps=None), "steps, minutes: expected at least one"),
        (dict(bins=4, bands=0), "bins: expected 0 for a shallow flow without bands, got 4.*--bands"),
        (dict(bins=4, kind="autoregressive"), "bins: expected 0 for a shallow flow without bands, got 4"),
        (dict(objective=ObjectiveConfig(imagined=1.0), bands=0), "objective.imagined: expected 0 but for .* bands, got 1.0"),
        (dict(objective=ObjectiveConfig(errors=0.5), kind="autoregressive"), "objective.errors: expected 0 but for .* got 0.5"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_told(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_mistakes_are_told(config):
    train(config)
    with pytest.raises(ValueError, match="Add --resume"):
        Trainer(config)
    with pytest.raises(ValueError, match=r"expected the configuration of the run.*noise"):
        Trainer(replace(config, resume=True, noise=0.1))
    with pytest.raises(ValueError, match="resume: expected a training run"):
        Trainer(replace(config, resume=True, out=config.out.parent / "nothing"))
