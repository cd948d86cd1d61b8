"""The shipped worlds: small files, a card, and an environment that steps."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from sfv_world.loading import SHIPPED

NAMES = ("doom-basic", "doom-takecover", "doom-camera")


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_world_is_small_and_has_its_card(name):
    folder = Path(SHIPPED, name)
    for path in folder.iterdir():
        assert path.stat().st_size <= 20 * 2**20, path
    results = json.loads((folder / "results.json").read_text())
    card = (folder / "README.md").read_text()
    assert f"{results['density']['bits_per_dim']:.3f}" in card
    assert f" train --data data/{name}" in card


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_world_steps_and_knows_likely_from_unlikely(name):
    env = gym.make("sfv_world/World-v0", world=name)
    world = env.unwrapped.world
    frame, _ = env.reset(seed=0)
    bits = []
    for _ in range(6):
        frame, _, terminated, _, info = env.step(np.zeros(env.action_space.shape, env.action_space.dtype))
        assert frame in env.observation_space
        assert info["certificate"] < 1e-3
        bits.append(info["bits_per_dim"])
        if terminated:
            break
    noise_alone = np.log2(world.model.config.noise * np.sqrt(2 * np.pi * np.e))
    assert noise_alone < np.mean(bits) < noise_alone + (0.4 if world.model.codec.shows_noise else 1.2)
    frames = world.starts["frames"][:1].numpy()
    shuffled = frames.copy()
    shuffled[:, -1] = shuffled[:, -1].reshape(1, -1, 3)[:, ::-1].reshape(shuffled[:, -1].shape)
    assert world.score(frames).bits_per_dim[0, -1] < world.score(shuffled).bits_per_dim[0, -1] - 0.2


def test_the_readme_says_what_was_measured():
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    for name in NAMES:
        results, behaviour = (
            json.loads(Path(SHIPPED, name, file).read_text()) for file in ("results.json", "behaviour.json")
        )
        density, rolled, played = results["density"], results["rollouts"], behaviour["random_play"]
        assert f"{density['bits_per_dim']:.3f}" in readme and f"± {density['bits_per_dim_error']:.3f}" in readme
        for which in ("psnr_of_the_mean", "gain_over_copying"):
            assert " / ".join(f"{found:.1f}" for found in rolled[which]["decibels"].values()) in " ".join(
                readme.split()
            )
        for play in (played["imagined"], played["real"]) if name != "doom-camera" else ():  # whose episodes have no end
            assert f"{100 * play['ended']['mean']:.0f} ± {100 * play['ended']['error']:.0f}%" in readme
            for what in ("steps", "return"):
                assert f"{play[what]['mean']:.0f} ± {play[what]['error']:.0f}" in readme
