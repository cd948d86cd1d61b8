"""The demo: plays a real game for a while, steps a world from the same beginning, and shows both."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from einops import rearrange
from gymnasium.wrappers import ResizeObservation
from jaxtyping import UInt8
from tqdm import tqdm

from sfv_world.agents.policies import load_policy
from sfv_world.data.clips import Actions, take
from sfv_world.data.collect import CollectConfig, record_episode
from sfv_world.envs.real import make_real
from sfv_world.film import check_film, write_animation, write_image, write_video
from sfv_world.given import DEVICE, check_counts, check_seed
from sfv_world.loading import load_world


@dataclass(frozen=True)
class DemoConfig:
    """What to show."""

    world: str = "doom-basic"
    """Name of a shipped world, or a folder."""
    out: Path = Path("out/demo")
    """Folder of the film `demo.mp4`, the same for web pages, `demo.webp`, and the contact sheet `demo.png`."""
    env: str | None = None
    """Real environment to begin in and to compare with; none: the one whose recording trained the world, if that was made by
    `sfv-world collect`."""
    policy: str = "random"
    """Who plays: "random", its actions held as in that recording, or the path of an agent saved by Stable-Baselines3 (.zip)."""
    episodes: int = 3
    """Real episodes to play."""
    frames: int = 48
    """Frames to imagine of each, at most."""
    context: int = 8
    """Real frames the world observes first; up to whole steps, where those have several frames."""
    seed: int = 1
    """Seed of the real game, random actions and the world."""
    device: str = DEVICE
    """Where to compute."""

    def __post_init__(self) -> None:
        check_counts(self, "episodes", "frames", "context")
        check_seed(self.seed)


def demo(config: DemoConfig) -> Path:
    """Steps a world through `gym.make`, prints what it says of each frame, and writes films and a contact sheet.

    Each pair of strips is an imagined episode above the real one, under the same actions.

    Raises:
        ValueError: if the real environment or the policy is not known, or its episodes are too short.
    """
    world = load_world(config.world, config.device)
    config = replace(config, context=world.model.codec.whole(config.context))
    denoise = "lookahead" if world.model.denoiser else world.decoding.denoise
    env = gym.make("sfv_world/World-v0", world=world, denoise=denoise)
    recipe = world.about.get("data", {}).get("recipe", {"env": None, "frame_skip": 1, "hold": CollectConfig.hold})
    name, (height, width, _) = config.env or recipe["env"], world.frame_shape
    if name is None:
        raise ValueError(
            f"env: expected a real environment, as the recording that trained {config.world} names none, got None. "
            "Give its id (--env)."
        )
    real = make_real(name, size=max(height, width), frame_skip=recipe["frame_skip"])
    real = ResizeObservation(real, (height, width))
    if real.action_space != world.action_space:
        raise ValueError(
            f"env: expected one with the actions of {world.name}, {world.action_space}, got {name!r} with {real.action_space}. "
            "Give the environment that the world learned from."
        )
    if config.policy != "random" and world.time > 1:
        raise ValueError(
            f"policy: expected 'random' for {world.name}, which holds an action for {world.time} frames, got {config.policy!r}."
        )
    check_film(2 * height, config.episodes * width)
    config.out.mkdir(parents=True, exist_ok=True)
    steps = config.context + config.frames
    recording = CollectConfig(env=name, out=config.out, seed=config.seed, max_episode_steps=steps)
    least, greatest = (-(-steps // world.time) for steps in recipe["hold"])
    policy = load_policy(config.policy, real, hold=(least, greatest), stride=world.time, deterministic=True)
    pairs = []
    for index in range(config.episodes):
        episode = record_episode(real, policy, recording, index)
        assert episode is not None, "nothing interrupts it"
        frames, actions = np.asarray(episode.observations), episode.actions
        last = len(frames) - 1
        if last <= config.context:
            print(f"episode {index} is left out: {last} frames, no more than the world observes first (--context)")
            continue
        pairs.append((_imagine(env, frames, actions, config, index, last), frames[config.context : last]))
    real.close()
    env.close()
    if not pairs:
        raise ValueError(f"context: expected fewer frames than the real episodes have, got {config.context}.")
    film = np.stack([_same_length([imagined, real], config.frames) for imagined, real in pairs])
    side_by_side = rearrange(film, "e two n h w c -> n (two h) (e w) c")
    write_video(config.out / "demo.mp4", side_by_side, world.fps)
    write_animation(config.out / "demo.webp", side_by_side, world.fps)
    chosen = film[:, :, np.unique(np.linspace(0, config.frames - 1, 16).astype(int))]
    write_image(config.out / "demo.png", rearrange(chosen, "e two n h w c -> (e two h) (n w) c"))
    print(f"wrote demo.mp4, demo.webp and demo.png in {config.out}: imagined above, real below")
    return config.out


def _imagine(
    env: gym.Env[Any, Any], frames: np.ndarray, actions: Actions, config: DemoConfig, index: int, last: int
) -> UInt8[np.ndarray, "n h w 3"]:
    """Resets to the beginning of a real episode and steps on with its actions, held for whole steps, to the end of either.

    With look-ahead, the first step tells of the last observed frame, and one more step of the last imagined one.
    """
    past = {"frames": frames[: config.context], "actions": take(actions, np.s_[: config.context - 1])}
    env.reset(seed=config.seed + index, options=past)
    imagined: list[np.ndarray] = []
    time = env.unwrapped.world.time  # type: ignore[attr-defined]
    bar = tqdm(total=last - config.context, desc=f"episode {index}", unit="frame")
    number = config.context - 1
    while len(imagined) < last - config.context:
        frame, reward, terminated, truncated, info = env.step(take(actions, min(number, last - 2)))
        number += time
        shown = number - info["frames_behind"]
        if shown < config.context:
            continue
        imagined.extend(frame.reshape(-1, *frames.shape[1:]))
        bar.update(time)
        tqdm.write(
            f"frame {shown:3d}  log-likelihood {info['log_likelihood']:9.1f} nats  {info['bits_per_dim']:6.3f} bits/dim  "
            f"sweeps {info['sweeps']}  certificate {info['certificate']:.1e}  reward {reward:6.1f}  "
            f"p(end) {info['termination_probability']:.2f}"
        )
        if terminated or truncated:
            break
    bar.close()
    return np.stack(imagined[: last - config.context])


def _same_length(films: list[np.ndarray], frames: int) -> UInt8[np.ndarray, "k n h w 3"]:
    """Films of `frames` frames each; one that ended earlier stays on its last frame."""
    return np.stack([film[np.minimum(np.arange(frames), len(film) - 1)] for film in films])
