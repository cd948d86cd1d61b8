"""Training on a frozen released model, by the real command: the adapter learns, the backbone stays, and the world is stepped."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import cv2
import gymnasium as gym
import numpy as np
import pytest
import torch
from adapted import DISCRETE, make_backbone
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import TransformAction
from minari.dataset.minari_storage import MinariStorage
from recorded import record, said
from test_text import LENGTH

import sfv_world
from sfv_world import World, cli, memory
from sfv_world.calibrate import CalibrateConfig, calibrate
from sfv_world.checkpoint import load_tensors
from sfv_world.counterfactual import CounterfactualConfig, counterfactual
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.demo import DemoConfig, demo
from sfv_world.evaluation import split_as_trained
from sfv_world.free_run import HorizonConfig, beginnings, choose_episodes, free_run, shown_frames
from sfv_world.horizon import horizon, real_frames
from sfv_world.released.backbone import Backbone, find_parts
from sfv_world.released.plan import sampling_needs
from sfv_world.released.text import load_text_encoder
from sfv_world.training import adapt, trainer
from sfv_world.training.config import TrainConfig
from sfv_world.training.objective import Batch
from sfv_world.training.trainer import Trainer, train


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recording, `data`, and a released model, `backbone`; tests must not change them."""
    home = tmp_path_factory.mktemp("adapt")
    make_backbone(home)
    record(home / "data", DISCRETE, lengths=(36, 33, 31, 40))
    return home


@pytest.fixture
def config(home, tmp_path):
    return TrainConfig(
        data=home / "data", out=tmp_path / "run", init=home / "backbone", freeze_backbone=True, prompt="a cat", steps=3,
        clip=10, held_out=0.3, device="cpu",
    )  # fmt: skip


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_makes_a_world_that_is_stepped(home, tmp_path, capsys, monkeypatch):
    out, before = tmp_path / "run", contents(home / "backbone")
    options = ["--steps", "3", "--clip", "10", "--prompt", "a cat", "--held-out", "0.3", "--device", "cpu"]
    where = ["--data", str(home / "data"), "--out", str(out), "--init", str(home / "backbone")]
    cli.main(["train", *where, "--freeze-backbone", *options])
    assert "held out flow_loss" in capsys.readouterr().out
    assert contents(home / "backbone") == before
    assert (out / "samples/000003.mp4").exists()
    said = json.loads((out / "config.json").read_text())["model"]
    assert not said["backbone"].startswith("/") and said["prompt"] == "a cat"
    kept = load_tensors(out / "model.safetensors")[0]
    assert {name.split(".")[0] for name in kept} == {"text", "unconditional", "controls", "adapter", "heads"}
    env = gym.make("sfv_world/World-v0", world=str(out), max_episode_steps=4)
    assert env.observation_space.shape == (4, 16, 24, 3) and env.action_space == DISCRETE
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    frames, reward, _, _, info = env.step(1)
    assert frames.shape == (4, 16, 24, 3) and np.isfinite([reward, info["log_likelihood"]]).all()
    guided = gym.make("sfv_world/World-v0", world=str(out), guidance=3.0)
    guided.reset(seed=0)
    moved, *_, said = guided.step(1)
    assert said["guided"] and not info["guided"] and not np.array_equal(moved, frames)
    rows, reset = [], World.reset
    monkeypatch.setattr(
        World, "reset", lambda self, frames, *a, **k: rows.append(len(frames)) or reset(self, frames, *a, **k)
    )
    few = ["--clips", "2", "--rollouts", "2", "--frames", "6", "--context", "3"]
    cli.main(["evaluate", "--world", str(out), "--data", str(home / "data"), *few])
    assert set(rows) == {1} and len(rows) == 2 * 2 + 6  # of clips one after the other: rollouts, and the film
    found, card = json.loads((out / "results.json").read_text()), (out / "README.md").read_text()
    assert (found["density"]["unit"], found["density"]["dimension"], found["rollouts"]["noised"]) == (
        "step",
        "latent",
        False,
    )
    assert found["rollouts"]["context"] == 5 and found["rollouts"]["largest_certificate"] < 1e-3
    steps = sum(-(-(n - 1) // 4) for n in split_as_trained(sfv_world.load_world(out), home / "data")[1].lengths)
    assert found["outcomes"]["frames"] == steps and (out / "rollouts.png").exists()
    assert (
        "on the released model in `../../" in card
        and f'world="{out}"' in card
        and "--prompt 'a cat'" in card
        and "the prompt `a cat`" in card
    )


@pytest.mark.parametrize("fps", [None, 10.0])
def test_the_prompt_is_kept_with_its_caption_and_without(home, config, tmp_path, fps):
    """As generating tells it: the noise, the frames' size, and the recording's frames a second where it says."""
    if fps:
        config = replace(config, data=tmp_path / "data")
        MinariStorage.read(record(config.data, DISCRETE, (36, 33))).update_metadata({"fps": fps})
    model = Trainer(replace(config, noise=0.3, held_out=0.5)).model
    told = f"Noise Level 300:\nA video with {int(fps or 16)} fps:\n{{}}\n\n in a 3:2 aspect ratio.\n"
    states = load_text_encoder(home / "backbone/text_encoder", LENGTH)([told.format("a cat"), told.format("")])
    assert torch.equal(model.text, states[:1]) and torch.equal(model.unconditional, states[1:])


def test_memory_is_counted_before_anything_is_loaded(config, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 1e4)
    for name in ("load_text_encoder", "AdaptedModel"):
        monkeypatch.setattr(adapt, name, lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="memory: expected about .* activations kept for training, about"):
        Trainer(config)
    names = ("activations kept for training, about",)
    kept = [
        [
            need.size
            for need in sampling_needs(*find_parts(config.init), 16, 24, 3, "float32", trained=batch)
            if need.what in names
        ]
        for batch in (0, 1, 8)
    ]
    assert kept[0] == [] and kept[2] == [8 * kept[1][0]]


def test_a_world_whose_steps_have_several_frames_is_shown_beside_the_game(config, tmp_path, monkeypatch):
    train(replace(config, steps=1))

    def make(render_mode=None):
        return TransformAction(gym.make("CartPole-v1", render_mode=render_mode), lambda _: 0, DISCRETE)

    gym.register("Three-v0", make)
    monkeypatch.setitem(gym.registry, "Three-v0", gym.registry.pop("Three-v0"))
    told, step = [], World.step
    monkeypatch.setattr(World, "step", lambda self, state, action: told.append(action) or step(self, state, action))
    shown = DemoConfig(str(config.out), tmp_path / "demo", env="Three-v0", episodes=2, frames=7, context=2)
    demo(shown)
    with av.open(str(tmp_path / "demo/demo.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 7
        assert film.streams.video[0].average_rate == 10
    assert cv2.imread(str(tmp_path / "demo/demo.png")).shape == (2 * 2 * 16, 7 * 24, 3)
    assert 2 <= len(told) <= 4  # CartPole falls after eight to ten frames: five are context
    with pytest.raises(ValueError, match=r"policy: expected 'random' for .*, which holds an action for 4 frames"):
        demo(replace(shown, policy="ppo.zip"))


def test_what_another_action_would_have_made_of_it(config, tmp_path, capsys):
    """Context and frames up to whole steps; the same actions give back what was seen."""
    train(replace(config, steps=1))
    capsys.readouterr()
    wanted = CounterfactualConfig(
        str(config.out), config.data, tmp_path / "other", frames=7, context=4, change_at=2, rows=2, device="cpu"
    )
    counterfactual(wanted)
    told = capsys.readouterr().out
    found = re.search(r"same action: ([\d.]+)% of the colour values as observed, the others within (\d+);", told)
    assert found and float(found[1]) > 95 and int(found[2]) <= 3 and "for 6 frames from 2 on" in told
    with av.open(str(tmp_path / "other/counterfactual.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 8
    assert cv2.imread(str(tmp_path / "other/counterfactual.png")).shape == (2 * 3 * 16, 8 * 24, 3)


def test_a_long_rollout_is_measured_by_whole_steps(config, tmp_path, capsys):
    """Imagined as steps are, through a restart of the chunk; real frames are shown as the world shows its own."""
    train(replace(config, steps=1, held_out=0.5))
    wanted = HorizonConfig(
        str(config.out),
        config.data,
        tmp_path / "far",
        frames=90,
        rows=2,
        context=4,
        references=20,
        seed=3,
        device="cpu",
    )
    found = horizon(wanted)
    assert "chunks of 21 latent frames that begin with the last 5 of the one before" in capsys.readouterr().out
    assert [entry["steps"] for entry in found["bins"]] == [[1, 8], [9, 16], [17, 32], [33, 64], [65, 92]]
    assert [entry["frames"] for entry in found["bins"]] == [16, 16, 32, 64, 56]
    assert 0 < found["largest_certificate"] < 1e-3 and found["config"]["context"] == 5
    assert cv2.imread(str(tmp_path / "far/frames.png")).shape[0] == 2 * 16

    world = sfv_world.load_world(config.out)
    held_out, wanted = split_as_trained(world, config.data)[1], replace(wanted, context=5, frames=12)
    begin = beginnings(held_out, choose_episodes(held_out, wanted), wanted)
    rollout = free_run(world, begin, wanted)
    state = world.reset(begin.frames, begin.actions[:, :4], 3 * 1_000_000_007 + np.arange(2))
    for n in range(0, 12, 4):
        state, output = world.step(state, begin.actions[:, 4 + n : 8 + n], held=False)
        assert np.array_equal(rollout.frames[:, n : n + 4], output.frames.numpy())
        assert np.array_equal(rollout.bits[:, n : n + 4], output.bits_per_dim[:, None].expand(-1, 4).numpy())
        assert np.array_equal(rollout.terminated[:, n + 3], output.terminated.numpy())
    assert not rollout.terminated[:, [0, 1, 2, 4, 5, 6]].any()

    shown, owner, number = real_frames(world, held_out, wanted)
    assert np.bincount(owner).tolist() == [(n - 1) // 4 * 4 for n in shown_frames(held_out)]
    start, first = held_out.starts[1], np.flatnonzero(owner == 1)[0]
    real, plain = held_out.frames[start + 1 : start + 5], world.with_decoding(denoise="none")
    assert number[first : first + 4].tolist() == [1, 2, 3, 4]
    codec = world.model.codec.frames(
        world.model.codec.signal(torch.from_numpy(held_out.frames[None, start : start + 5]))
    )
    cleaned, noised = shown[first : first + 4], real_frames(plain, held_out, wanted)[0][first : first + 4]
    off = [np.abs(frames - codec[0, 1:].numpy().astype(float)).mean() for frames in (cleaned, noised, real)]
    assert 0 < off[0] and cleaned.shape == real.shape and not np.array_equal(cleaned, noised) and off[1] < off[2]
    for changes, message in (
        ({"restart": 10}, "restart: expected none for run, a world on a released model.*got 10"),
        ({"project": True}, "project: expected a world with a denoiser"),
    ):
        with pytest.raises(ValueError, match=message):
            horizon(replace(wanted, **changes))


def test_rows_on_a_released_model_live_on_by_whole_steps(config):
    train(replace(config, steps=1, held_out=0.5))
    world = sfv_world.load_world(config.out)
    with torch.no_grad():  # about every seventh step ends an episode, whatever it shows
        world.model.heads.mlp[-1].weight[0] = 0
        world.model.heads.mlp[-1].bias[0] = -2
    held_out = split_as_trained(world, config.data)[1]
    wanted = HorizonConfig(str(config.out), config.data, frames=24, rows=3, context=5, survive=6)
    begin = beginnings(held_out, choose_episodes(held_out, wanted), wanted)
    kept, found = free_run(world, begin, replace(wanted, survive=None)), free_run(world, begin, wanted)
    assert kept.terminated.any() and not found.terminated.any()
    ended = kept.terminated.reshape(3, 3, 8).any(2)
    for row in range(3):  # stretches are of two steps
        same = 8 * int(ended[row].argmax()) if ended[row].any() else 24
        assert np.abs(found.frames[row, :same].astype(int) - kept.frames[row, :same]).max(initial=0) <= 1
        assert same == 24 or not np.array_equal(found.frames[row, same : same + 4], kept.frames[row, same : same + 4])


def test_the_size_of_its_blocks_is_calibrated(config):
    train(replace(config, steps=1))
    found = calibrate(CalibrateConfig(str(config.out), steps=1, device="cpu"))
    assert found.keys() == {None, 4}  # of six tokens
    best = min(found, key=found.get)
    assert sfv_world.load_world(config.out).decoding == DecodingConfig(block=best, denoise="causal")


def test_the_backbone_stays_bit_for_bit_and_the_adapter_learns(config):
    run = Trainer(replace(config, steps=30, learning_rate=1e-2, batch=4, ema=0.9, warmup=5))
    backbone = run.model.backbone
    before = {
        name: tensor.clone() for part in (backbone.flow, backbone.codec) for name, tensor in part.state_dict().items()
    }
    adapter = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    first = run.validate()
    assert run.config.clip == 9 and run.average.module.backbone is backbone
    last = run.run()
    assert last["nats_per_dim"] < first["nats_per_dim"] - 0.01 and last["termination_loss"] < first["termination_loss"]
    after = {name: tensor for part in (backbone.flow, backbone.codec) for name, tensor in part.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in backbone.flow.parameters())
    learned = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, adapter[name])}
    assert learned == adapter.keys() - {"text", "unconditional"}
    world = sfv_world.load_world(config.out)
    for name, tensor in run.averaged.state_dict().items():
        assert torch.equal(tensor, world.model.state_dict()[name])
    assert world.model.text.abs().sum() > 0


def test_two_processes_train_as_one_does(home, tmp_path):
    shared = dict(
        data=str(home / "data"), init=str(home / "backbone"), freeze_backbone=True, steps=3, clip=9, batch=4, held_out=0.3,
        warmup=2, device="cpu",
    )  # fmt: skip
    plan, ends = tmp_path / "plan.json", tmp_path / "ends.json"
    plan.write_text(json.dumps([[n, {**shared, "out": str(tmp_path / str(n))}] for n in (1, 2)]))
    command = [sys.executable, str(Path(__file__).parent / "processes.py"), str(plan), str(ends)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(ends.read_text()) == {"1": ["done"], "2": ["done", "done"]}
    one, two = (load_tensors(tmp_path / n / "model.safetensors")[0] for n in ("1", "2"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_says_what_the_backbone_says(config):
    model = Trainer(config).model.eval()
    frames = torch.randint(256, (2, 9, 16, 24, 3), generator=torch.Generator().manual_seed(0)).byte()
    tokens = model.noised_tokens(frames, torch.zeros(2, 3, 16, 24, 3), torch.zeros(2, 3, 2, 3, 4))
    with torch.no_grad():
        found = model(tokens, torch.ones(2, 3, 12), torch.ones(2, 3, dtype=torch.bool)).encoding
        plain = model.flow(tokens, model.text.expand(2, -1, -1), (2, 3))
    assert torch.equal(found.log_prob, plain.log_prob) and torch.equal(found.noise, plain.noise)


def test_a_run_resumes_exactly(config, tmp_path):
    train(replace(config, steps=4, out=tmp_path / "whole"))
    half = Trainer(replace(config, steps=4))
    for _ in range(2):
        half._train_step()
    half.save({})
    Trainer(replace(config, steps=4, resume=True)).run()
    whole, found = (load_tensors(out / "model.safetensors")[0] for out in (tmp_path / "whole", config.out))
    assert all(torch.equal(tensor, found[name]) for name, tensor in whole.items())
    with pytest.raises(ValueError, match="resume: expected what the run in .* began with"):
        Trainer(replace(config, steps=4, resume=True, prompt="a dog"))


def test_an_adapter_is_trained_on(home, config, tmp_path):
    """With the prompt and the noise that it had, and what it learned, also of a game with other actions; not on another model."""
    train(replace(config, learning_rate=1e-2, warmup=1, noise=0.4))
    first = sfv_world.load_world(config.out).model
    again = Trainer(replace(config, init=config.out, out=tmp_path / "again", prompt=""))
    assert again.config.prompt == "a cat" and again.config.noise == first.config.noise == 0.4
    assert again.before == {"steps": 3, "minutes": 0.0}
    for name, tensor in again.model.state_dict().items():
        assert torch.equal(tensor, first.state_dict()[name]), name
    again.run()
    assert len(set(again.model.state_dict()["adapter.layers.0.gate"].tolist())) > 1
    assert sfv_world.load_world(tmp_path / "again").about["before"] == {"steps": 3, "minutes": 0.0}
    resumed = Trainer(replace(config, init=config.out, out=tmp_path / "again", prompt="", steps=4, resume=True))
    assert resumed.step == 3 and resumed.before == again.before

    record(tmp_path / "other", spaces.Discrete(5), lengths=(36, 33, 31, 40))
    other = Trainer(replace(config, init=config.out, data=tmp_path / "other", out=tmp_path / "five"))
    differ = {n for n, w in other.model.state_dict().items() if not torch.equal(w, first.state_dict().get(n, w[:0]))}
    assert differ == {name for name in first.state_dict() if name.startswith("controls.project.")}
    with pytest.raises(ValueError, match=r"init: expected the split of this recording .*--held-out 0.3"):
        MinariStorage.read(record(tmp_path / "named", DISCRETE, (36, 33))).update_metadata({"dataset_id": "known-v0"})
        said(config.out, data={"dataset_id": "known-v0"})
        Trainer(replace(config, init=config.out, data=tmp_path / "named", out=tmp_path / "split", held_out=0.5))
    known = json.loads((config.out / "config.json").read_text())
    known["model"]["fingerprint"] += 1
    (config.out / "config.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match="init: expected a world on the released model that .* was trained on"):
        Trainer(replace(config, init=config.out, out=tmp_path / "else"))


def test_validation_takes_no_more_clips_at_once_than_training(config, monkeypatch):
    counts, loss = [], trainer.world_loss
    monkeypatch.setattr(
        trainer, "world_loss", lambda model, batch, *more: counts.append(len(batch.frames)) or loss(model, batch, *more)
    )
    run = Trainer(replace(config, batch=2))
    run.validate(batches=1)
    assert counts == [2] * 8


def test_a_run_goes_on_wherever_its_folder_lies(config, tmp_path):
    train(config)
    moved = tmp_path / "deeper/run"
    moved.parent.mkdir()
    config.out.rename(moved)
    with pytest.raises(ValueError, match="backbone: expected the released model"):
        sfv_world.load_world(moved)
    known = json.loads((moved / "config.json").read_text())
    known["model"]["backbone"] = str(config.init)
    (moved / "config.json").write_text(json.dumps(known))
    assert Trainer(replace(config, out=moved, steps=4, resume=True)).step == 3
    bare = replace(config, out=moved, steps=4, resume=True, freeze_backbone=False, init=None, prompt="")
    with pytest.raises(ValueError, match=r"resume: expected --freeze-backbone and --init for the run in .*run"):
        Trainer(bare)


def test_rewards_and_ends_of_a_step_are_those_of_its_frames(config):
    run = Trainer(replace(config, clip=13))
    clips = run.sampler.clips(np.array([run.train.ends[0] - 8]))
    clips = replace(clips, rewards=np.arange(13, dtype=np.float32)[None] * clips.valid)
    batch = Batch.from_clips(clips, run.model)
    # Eight frames are recorded: the first, one whole step, and three of the next, with the last of which the episode ended.
    assert batch.rewards.tolist() == [[0, 1 + 2 + 3 + 4, 5 + 6 + 7, 0]]
    assert batch.terminations.tolist() == [[False, False, True, False]]
    assert batch.valid.tolist() == [[True, True, True, False]] and batch.terminal.tolist() == [
        [False, False, True, False]
    ]
    assert batch.actions.shape == (1, 4, 12) and batch.known.tolist() == [[False, True, True, True]]
    assert torch.equal(batch.actions[0, 0], torch.zeros(12)) and batch.actions[0, 1].sum() == 4


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"init": None}, r"freeze_backbone: expected the folder of a released model in init, got none.*--init"),
        (
            {"patch": 2},
            r"freeze_backbone: expected --parallel ddp and no codec, patch, bands, bins or groups.*got ddp, None, 2",
        ),
        ({"groups": 2}, r"freeze_backbone: expected --parallel ddp.*got ddp, None, None, None, 0 and 2"),
        ({"parallel": "fully-shard"}, r"freeze_backbone: expected --parallel ddp"),
        *(
            (
                {name: value},
                f"freeze_backbone: expected no preset, kind, window or --no-denoiser.*got {{'{name}': {value!r}}}",
            )
            for name, value in (("preset", "tiny"), ("kind", "autoregressive"), ("window", 4), ("denoiser", False))
        ),
        ({"freeze_backbone": False}, r"prompt: expected none without --freeze-backbone, got 'a cat'"),
        ({"freeze_backbone": False, "prompt": ""}, r"expected a world, got a released model.*--freeze-backbone"),
        ({"clip": 3}, r"clip: expected 5 to 81 frames.*got 3"),
        ({"clip": 82}, r"clip: expected 5 to 81 frames.*got 82"),
        ({"noise": 0.0}, r"noise: expected more than 0, for frames without noise have no density, got 0.0"),
        ({"noise": -0.5}, r"noise: expected more than 0, for frames without noise have no density, got -0.5"),
        ({"init": "data"}, r"data: expected the folder of a converted model"),
        ({"init": "own"}, r"init: expected a folder made by `sfv-world convert`, got .*own"),
        ({"data": "odd"}, r"height, width: expected multiples of 8 pixels.*got frames of 20 x 24.*collect"),
        ({"init": "no-text"}, r"no-text/text_encoder: expected the folder of a T5 encoder"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(home, config, tmp_path, monkeypatch, change, expected):
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text(json.dumps({"format": 3}))
    (own / "model.safetensors").write_bytes(b"")
    if change.get("init") == "no-text":
        (tmp_path / "no-text").mkdir()
        for path in (home / "backbone").iterdir():
            if path.name != "text_encoder":
                (tmp_path / "no-text" / path.name).symlink_to(path)
    if "data" in change:
        record(tmp_path / "odd", DISCRETE, height=20)
    folders = {"data": home / "data", "own": own, "odd": tmp_path / "odd", "no-text": tmp_path / "no-text"}
    change = {name: folders.get(value, value) for name, value in change.items()}
    monkeypatch.setattr(Backbone, "load", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=expected):
        train(replace(config, **change))
    assert not config.out.exists()
