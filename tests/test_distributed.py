"""Many processes train as one does: the same curve, the same state on another number of processes, the same mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import tiny_model
from gymnasium import spaces
from recorded import record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from sfv_world.checkpoint import load_model
from sfv_world.training.distributed import ALONE, Group, load_state, save_state

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
SMALL = dict(
    preset="tiny", steps=3, patch=8, clip=4, window=2, batch=6, bands=2, warmup=2, held_out=0.3, device="cpu",
    validate_minutes=0.0, objective={"score_every": 2, "imagined": 1.0},
)  # fmt: skip
LENGTHS = (6, 7, 30, 5, 30, 6, 7, 5)
"""Frames of the episodes: those to train on are short, so that many clips are padded; those held out are long enough to film."""
TESTS = Path(__file__).parent


def python(*arguments, cwd=TESTS.parent):
    """Runs a script or a module on CPUs: where there is a GPU, writing a state looks at it, which forked processes may not."""
    command, env = [sys.executable, *map(str, arguments)], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def curve(folder, name):
    """Values of a metric by step, as the run told TensorBoard."""
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def same(folder, other):
    """Whether two runs had the same curves and left the same world."""
    for name in ("train/flow_loss", "train/reward_loss", "train/gradient_norm", "held_out/nats_per_dim"):
        expected, found = curve(folder, name), curve(other, name)
        assert expected.keys() == found.keys() == {1, 2, 3}
        close(torch.tensor(list(found.values())), torch.tensor(list(expected.values())))
    expected, found = (curve(path, "train/score_loss") for path in (folder, other))
    assert expected.keys() == found.keys() == {1, 3}
    close(torch.tensor(list(found.values())), torch.tensor(list(expected.values())))
    expected, found = (load_model(path)[0].state_dict() for path in (folder, other))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which worlds were trained on one, two and three processes."""
    home = tmp_path_factory.mktemp("home")
    data = str(record(home / "data", spaces.Discrete(3), LENGTHS))

    def run(name, **options):
        return {**SMALL, "data": data, "out": str(home / name), **options}

    drafted = {"kind": "autoregressive", "bands": 0, "objective": {"score_every": 2}}
    shards = {"parallel": "fully-shard"}
    plan = [
        (1, run("one")),
        (1, run("one-drafted", **drafted)),
        (1, run("from-one", stop=1)),
        (2, run("copies")),
        (2, run("shards", **shards)),
        (2, run("drafted", **drafted, **shards)),
        (2, run("from-one", resume=True, **shards)),
        (2, run("to-three", stop=1, **shards)),
        (2, run("to-one", stop=2)),
        (2, run("poisoned", poison=1)),
        (2, run("poisoned-shards", poison=1, **shards)),
        (2, run("odd", batch=3)),
        (3, run("to-three", resume=True, **shards)),
        (1, run("to-one", resume=True)),
    ]
    (home / "plan.json").write_text(json.dumps(plan))
    python(TESTS / "processes.py", home / "plan.json", home / "ends.json")
    return home


def ends(home, name):
    return json.loads((home / "ends.json").read_text())[name]


@pytest.mark.parametrize("name", ["copies", "shards"])
def test_two_processes_train_as_one(home, name):
    assert ends(home, name) == ["done"] * 2
    same(home / "one", home / name)


def test_every_kind_of_flow_can_be_sharded(home):
    assert ends(home, "drafted") == ["done"] * 2
    same(home / "one-drafted", home / "drafted")


def test_shards_lie_on_the_device_of_the_group_whatever_the_machine_has(monkeypatch):
    monkeypatch.setattr(torch._C, "_get_accelerator", lambda *arguments: torch.device("cuda"))
    model = tiny_model("bands", spaces.Discrete(3), 0)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        Group(1, 2, "cpu").shard(model)
    finally:
        dist.destroy_process_group()
    shards = list(model.parameters())
    assert all(isinstance(shard, DTensor) and shard.device_mesh.device_type == "cpu" for shard in shards)


@pytest.mark.parametrize(
    ("name", "told"), [("from-one", ["done"] * 2), ("to-three", ["done"] * 3), ("to-one", ["done"])]
)
def test_a_run_goes_on_with_another_number_of_processes(home, name, told):
    assert ends(home, name) == told
    same(home / "one", home / name)


@pytest.mark.parametrize("name", ["poisoned", "poisoned-shards"])
def test_a_loss_that_is_not_finite_on_one_process_stops_all(home, name):
    for told in ends(home, name):
        assert told.startswith("step 1: the flow's loss is nan") and "--resume" in told
    _, about = load_model(home / name)
    assert about["steps"] == json.loads((home / name / "training.json").read_text())["step"] == 1


def test_a_batch_must_be_shared_equally(home):
    for told in ends(home, "odd"):
        assert told.startswith("batch: expected a multiple of the 2 processes, got 3 clips.")
    assert not (home / "odd").exists()
    assert [Group(rank, 3).share(6) for rank in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]


def test_one_state_is_kept(home):
    for name, processes in (("copies", 2), ("to-three", 3), ("to-one", 1)):
        (folder,) = (home / name).glob("training.*/")
        assert json.loads((home / name / "training.json").read_text())["shards"] == folder.name
        files = {path.name for path in folder.iterdir()}
        assert files and all(file.endswith(".safetensors") for file in files)
        assert len(files) == processes


def test_a_state_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path, found = tmp_path / "training.json", {"x": torch.zeros(3)}
    save_state(path, {"x": torch.ones(3)}, {"step": 1}, ALONE)

    def full(*arguments):
        (tmp_path / "training.b").mkdir(exist_ok=True)
        (tmp_path / "training.b/half").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    with pytest.raises(OSError, match="training.b: expected to write the state.*No space left"):
        save_state(path, {"x": torch.full((3,), 2.0)}, {"step": 2}, ALONE)
    assert {found.name for found in tmp_path.iterdir()} == {"training.json", "training.a"}
    load_state(path, found, ALONE)
    assert found["x"].tolist() == [1, 1, 1] and json.loads(path.read_text())["step"] == 1
    (shard,) = (tmp_path / "training.a").iterdir()
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(ValueError, match="training.a: expected the state of a run"):
        load_state(path, found, ALONE)


def test_the_command(home):
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name not in ("steps", "objective")
    ]
    options += ["--minutes=0.0001", "--parallel=fully-shard"]
    command = ("-m", "sfv_world", "train", "--data", home / "data", "--out", home / "command", *options)
    done = python("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *command)
    assert done.stdout.count("parameters") == done.stdout.count("held out flow_loss") == 1
    assert load_model(home / "command")[1]["steps"] == 1
    assert {path.suffix for path in (home / "command/samples").iterdir()} == {".mp4", ".png"}


def test_ctrl_c_keeps_what_all_processes_learned(home, tmp_path):
    out, log = home / "interrupted", tmp_path / "log"
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items() if name not in ("steps", "objective")
    ]
    command = ["-m", "sfv_world", "train", "--data", home / "data", "--out", out, *options, "--minutes=5"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    with log.open("w") as written:
        process = subprocess.Popen(
            list(map(str, launcher)),
            stdout=written,
            stderr=written,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests may run where it is ignored
        )
    while "step 2," not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) != 0
    assert "stopped after step" in log.read_text()
    steps = load_model(out)[1]["steps"]
    python("-m", "sfv_world", *command[2:-1], "--resume", f"--steps={steps + 1}")
    assert load_model(out)[1]["steps"] == steps + 1
