"""Training: it learns, resumes exactly, and a run that goes wrong leaves the last good checkpoint."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from gymnasium import spaces
from recorded import LENGTHS, record, said
from tiny import normal

from sfv_world.checkpoint import CONFIG, MODEL, STARTS, load_model, load_tensors, replacing
from sfv_world.data.clips import load_episodes
from sfv_world.data.collect import CollectConfig, collect
from sfv_world.evaluation import split_as_trained
from sfv_world.given import alone_in
from sfv_world.interrupt import patient
from sfv_world.loading import load_world
from sfv_world.training import trainer
from sfv_world.training.config import TrainConfig
from sfv_world.training.objective import ObjectiveConfig
from sfv_world.training.run import STATE
from sfv_world.training.trainer import Trainer, train

COLLECTED = CollectConfig(env="doom-basic", out=Path(), frames=200, size=16)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return collect(replace(COLLECTED, out=tmp_path_factory.mktemp("data") / "doom"))


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


def test_ctrl_c_keeps_what_was_learned_and_a_resumed_run_goes_on_exactly(config, ctrl_c, monkeypatch, tmp_path, capsys):
    whole = replace(config, out=tmp_path / "whole")
    train(whole)
    real_step = Trainer._train_step

    def interrupted(self):
        if self.step == 3:
            ctrl_c()
        return real_step(self)  # and what is under way is finished

    monkeypatch.setattr(Trainer, "_train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert f"stopped after step 4: {config.out} keeps it (--resume goes on)" in capsys.readouterr().out
    monkeypatch.setattr(Trainer, "_train_step", real_step)
    resumed = Trainer(replace(config, resume=True))
    assert resumed.step == 4
    resumed.run()
    expected, found = tensors(whole), tensors(config)
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    Trainer(replace(config, resume=True)).run()
    assert f"nothing to do: {config.out} has 6 steps" in capsys.readouterr().out


def test_a_second_ctrl_c_stops_at_once(ctrl_c):
    with pytest.raises(KeyboardInterrupt), patient() as interrupted:
        assert not interrupted()
        ctrl_c()
        assert interrupted()
        ctrl_c()
    with pytest.raises(KeyboardInterrupt), patient(possible=False):
        ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with patient() as interrupted:
        ctrl_c()
        assert not interrupted()


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


def test_what_a_killed_run_was_writing_is_removed_by_the_next(config, monkeypatch):
    """And nothing else: neither what others write there nor what they keep."""
    train(config)
    (config.out / ".results.json.77").touch()
    (config.out / ".model.safetensors.old").touch()
    kept = files(config)

    class Killed(BaseException):
        pass

    def killed(path, target):
        raise Killed

    for path in (config.out / STATE, config.out / MODEL, config.out / STARTS, config.out / "samples/000006.mp4"):
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(os, "replace", killed)
            patched.setattr(Path, "unlink", lambda *arguments, **options: None)  # SIGKILL leaves no time for it
            with replacing(path):
                pass
    assert len(files(config)) == len(kept) + 4
    train(replace(config, resume=True))
    assert files(config) == kept


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
    raster = replace(config, bands=0, init=config.out, out=tmp_path / "raster")
    train(raster)
    for change in ({"bands": 2}, {"bands": 2, "bins": 4}, {"groups": 2, "bins": 4, "init": raster.out}):
        begun = Trainer(replace(config, **{"init": config.out, "out": tmp_path / "other"} | change))
        kept = load_model(begun.config.init)[0].state_dict()
        for name, tensor in begun.model.state_dict().items():
            assert name.startswith("flow.shallow.") or torch.equal(tensor, kept[name]), name
    for change in ({"window": 2}, {"denoiser": False}):
        begun = Trainer(replace(config, init=config.out, out=tmp_path / "changed", **change)).model.state_dict()
        assert len(begun) > 50
        for name, tensor in begun.items():
            assert torch.equal(second.model.state_dict()[name], tensor), name
    with pytest.raises(
        ValueError, match=r"init: expected a world of this one's shape, got .* with noise 0.05 \(here 0.1\)\."
    ):
        Trainer(replace(config, init=config.out, out=tmp_path / "third", noise=0.1))


def test_what_a_world_was_trained_on_is_not_held_out_by_one_that_begins_with_it(config, recording, tmp_path):
    """Of a recording that went on since, nor by another split; a recording in another folder is the same by its recipe."""
    longer = collect(replace(COLLECTED, out=tmp_path / "longer", frames=350))
    train(config)
    second = replace(config, data=longer, init=config.out, out=tmp_path / "second", steps=1)
    run = Trainer(second)
    assert np.array_equal(run.held_out.actions, Trainer(replace(config, resume=True)).held_out.actions)
    assert run.later > 0 and run.config.episodes == len(load_episodes(recording))
    options = f"--seed 0 --held-out 0.3 --episodes {run.config.episodes}"
    for change in ({"seed": 1}, {"held_out": 0.4}, {"episodes": 3}, {"episodes": len(load_episodes(longer))}):
        with pytest.raises(
            ValueError, match=rf"init: expected the split .* {options}, got .*Give these options"
        ) as told:
            Trainer(replace(second, **change))
        assert all(f"--{name.replace('_', '-')} {value}" in str(told.value) for name, value in change.items())
    shorter = collect(replace(COLLECTED, out=tmp_path / "shorter", frames=100))
    with pytest.raises(ValueError, match=rf"init: .* {options}, got .* --episodes {len(load_episodes(shorter))}: "):
        Trainer(replace(second, data=shorter))
    other = collect(replace(COLLECTED, out=tmp_path / "other", seed=1))
    assert Trainer(replace(second, data=other, seed=1)).later == 0
    training = json.loads((config.out / CONFIG).read_text())["about"]["training"]
    said(config.out, training={name: value for name, value in training.items() if name != "episodes"})  # as once
    assert Trainer(second).later == 0
    with pytest.raises(ValueError, match=r"init: expected the split .* --seed 0 --held-out 0.3, got --seed 1 "):
        Trainer(replace(second, seed=1))
    said(config.out, data={})
    assert Trainer(replace(second, seed=1)).later == 0


def test_a_run_can_start_from_a_world_of_another_game(config, tmp_path):
    """All but what actions mean is kept."""
    game, other = (record(tmp_path / str(n), spaces.Discrete(n), LENGTHS) for n in (3, 7))
    train(replace(config, data=game))
    begun = Trainer(replace(config, data=other, init=config.out, out=tmp_path / "second")).model
    before, _ = load_model(config.out)
    assert begun.action_space.n == 7 != before.action_space.n
    anew = {name for name, tensor in before.state_dict().items() if not torch.equal(begun.state_dict()[name], tensor)}
    assert anew == {f"controls.project.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")}


def test_folders_of_other_things_are_left_alone(config):
    with pytest.raises(ValueError, match=r"out: expected a new folder, found main_data.hdf5, metadata.json, parts in "):
        Trainer(replace(config, out=config.data))
    (config.out / "tensorboard").mkdir(parents=True)
    Trainer(config)  # of a run that ended before its first checkpoint


def test_a_resumed_run_knows_what_it_began_with(config, tmp_path):
    train(config)
    second = replace(config, init=config.out, out=tmp_path / "second")
    train(second)
    resumed = Trainer(replace(second, init=None, resume=True))
    assert resumed.before is not None and resumed.before["steps"] == 6
    assert resumed.config.init == config.out


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
        (dict(steps=0), "steps: expected more than 0, got 0"),
        (dict(minutes=-1.0), "minutes: expected more than 0, got -1.0"),
        (dict(warmup=0), "warmup: expected more than 0, got 0"),
        (dict(seed=-1), r"seed: expected 0 to 2\*\*32 - 1, got -1"),
        (dict(bins=4, bands=0), "bins: expected 0 for a shallow flow without bands, got 4.*--bands"),
        (dict(bins=4, kind="autoregressive"), "bins: expected 0 for a shallow flow without bands, got 4"),
        (dict(objective=ObjectiveConfig(imagined=1.0), bands=0), "objective.imagined: expected 0 but for .* bands, got 1.0"),
        (dict(objective=ObjectiveConfig(errors=0.5), kind="autoregressive"), "objective.errors: expected 0 but for .* got 0.5"),
    ],
)  # fmt: skip
def test_options_out_of_range_or_that_do_not_go_together_are_told(config, changes, message):
    with pytest.raises(ValueError, match=message):
        replace(config, **changes)


def test_one_run_at_a_time_trains_in_a_folder(config):
    with alone_in(config.out), pytest.raises(ValueError, match="out: expected a folder that no other run writes to"):
        train(config)
    assert not config.out.exists()


def test_a_run_whose_state_is_damaged_is_told(config):
    train(config)
    (config.out / STATE).write_text("{cut off")
    with pytest.raises(ValueError, match=r"training.json: expected what the run said of itself, got .*--init"):
        train(replace(config, steps=9, resume=True))


def test_a_run_of_before_an_option_was_there_goes_on(config):
    train(config)
    state = json.loads((config.out / STATE).read_text())
    del state["config"]["objective"]["rare_weight"], state["config"]["busy"]
    (config.out / STATE).write_text(json.dumps(state))
    train(replace(config, steps=config.steps + 1, resume=True))
    changed = replace(config, steps=config.steps + 2, resume=True, objective=ObjectiveConfig(rare_weight=1.0))
    with pytest.raises(ValueError, match="resume: expected the configuration of the run.*objective"):
        train(changed)


def test_validation_weighs_as_training_does(config):
    objective = ObjectiveConfig(motion_weight=0.0, errors=1.0, imagined=1.0, action_dropout=0.5)
    found = Trainer(replace(config, objective=objective)).validate()
    assert found["flow_loss"] == pytest.approx(found["nats_per_dim"], abs=1e-6)
    weighted = Trainer(replace(config, out=config.out / "other")).validate()
    assert weighted["nats_per_dim"] == found["nats_per_dim"] and weighted["flow_loss"] != weighted["nats_per_dim"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch=0), "patch must divide height and width, got patch 0"),
        (dict(window=0), "window: expected more than 0, got 0"),
        (dict(noise=0.0), "noise: expected more than 0.*got 0.0"),
    ],
)  # fmt: skip
def test_shapes_that_are_none_are_told(config, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(replace(config, **changes))


def test_short_episodes_of_any_actions_can_be_learned(config, tmp_path):
    """Clips go on beyond their ends, films are as long as they can be."""
    short = record(tmp_path / "short", spaces.Discrete(3, start=1), lengths=(8,) * 6)
    train(replace(config, data=short))
    (film,) = (config.out / "samples").glob("*.png")
    assert cv2.imread(str(film)).shape == (4 * 2 * 16, 3 * 24, 3)  # 8 frames, four of them read, one as an end
    shortest = record(tmp_path / "shortest", spaces.Discrete(3), lengths=(4,) * 6)
    with pytest.raises(ValueError, match=r"data: expected a held-out episode of more than 4 frames.*got at most 4"):
        Trainer(replace(config, data=shortest, out=tmp_path / "none"))


def test_a_recording_that_goes_on_is_split_as_it_was(config, tmp_path, capsys):
    actions = spaces.Discrete(3)
    short, then, now = (record(tmp_path / str(n), actions, LENGTHS[:n]) for n in (4, 6, 8))
    began = Trainer(replace(config, data=then, steps=1))
    began.run()
    on = Trainer(replace(config, data=now, steps=2, resume=True))
    on.run()
    assert "2 later ones left out" in capsys.readouterr().out
    found = split_as_trained(load_world(config.out), now)
    for before, *after in zip((began.train, began.held_out), (on.train, on.held_out), found, strict=True):
        assert all(np.array_equal(part.frames, before.frames) for part in after)
    with pytest.raises(ValueError, match="episodes: expected at least 6, the first of which are split, got 4"):
        split_as_trained(load_world(config.out), short)
    with pytest.raises(ValueError, match="episodes: expected at least 6, the first of which are split, got 4"):
        Trainer(replace(config, data=short, steps=3, resume=True))
    with pytest.raises(ValueError, match=r"expected the configuration of the run.*'episodes': \(6, 8\)"):
        Trainer(replace(config, data=now, steps=3, resume=True, episodes=8))
    path = config.out / STATE  # a run that says nothing of it is split as the recording is
    told = json.loads(path.read_text())
    del told["config"]["episodes"]
    path.write_text(json.dumps(told))
    assert len(Trainer(replace(config, data=now, steps=3, resume=True)).train) == 6


def test_mistakes_are_told(config):
    train(config)
    with pytest.raises(ValueError, match="Add --resume"):
        Trainer(config)
    with pytest.raises(ValueError, match=r"expected the configuration of the run.*noise"):
        Trainer(replace(config, resume=True, noise=0.1))
    with pytest.raises(ValueError, match="resume: expected a training run"):
        Trainer(replace(config, resume=True, out=config.out.parent / "nothing"))
    (config.out / STATE).unlink()
    with pytest.raises(ValueError, match=r"out: expected a folder without a codec or world, found config.json"):
        Trainer(config)
