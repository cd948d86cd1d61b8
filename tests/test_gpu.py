"""What only a CUDA device can show: it decodes the same frames, and trains in bfloat16."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sfv_world.data.collect import CollectConfig, collect
from sfv_world.loading import load_world
from sfv_world.training.trainer import TrainConfig, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_the_device_decodes_the_same_frames(tiny_folder):
    cpu, cuda = load_world(tiny_folder), load_world(tiny_folder, "cuda")
    a, b = cpu.start([1, 2]), cuda.start([1, 2])
    for _ in range(5):
        (a, x), (b, y) = cpu.step(a, [0, 1]), cuda.step(b, [0, 1])
        torch.testing.assert_close(a.stream.tokens, b.stream.tokens.cpu(), atol=5e-3, rtol=0)
        torch.testing.assert_close(x.log_likelihood, y.log_likelihood.cpu(), atol=0.1, rtol=1e-4)
        assert (y.certificate < cuda.decoding.tolerance).all()


def test_training_in_bfloat16_learns(tmp_path):
    data = collect(CollectConfig(env="doom-basic", out=tmp_path / "data", frames=200, size=16))
    config = TrainConfig(
        data=data, out=tmp_path / "run", preset="tiny", steps=2, clip=4, held_out=0.3, ema=0.9, device="cuda"
    )
    before = train(config)
    after = train(replace(config, steps=60, out=tmp_path / "longer"))
    assert np.isfinite(after["nats_per_dim"]) and after["nats_per_dim"] < before["nats_per_dim"]
