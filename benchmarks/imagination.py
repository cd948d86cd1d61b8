"""What is an agent worth in the game that learned in imagination? PPO in a world and PPO in the game, both judged in the game.

    python benchmarks/imagination.py --world doom-basic --steps 100000

Whoever learns in the world sees no frame of the game before it is judged there. Prints a table, writes JSON with the machine, the
versions and the commit, and the agents beside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from report import Report, Rows, command
from stable_baselines3 import PPO
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor, VecNormalize

from sfv_world.envs.real import make_real
from sfv_world.envs.sb3 import WorldVecEnv
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.given import DEVICE, check_counts, set_threads
from sfv_world.loading import load_world
from sfv_world.world import World

Place = Literal["world", "game"]
SMALLEST = 36
"""Pixels a side that the convolutions of `CnnPolicy` take."""


@dataclass(frozen=True)
class ImaginationConfig:
    """What to learn where."""

    world: str = "doom-basic"
    """Name of a shipped world, or its folder."""
    places: tuple[Place, ...] = ("world", "game")
    """Where agents learn."""
    steps: int = 100_000
    """Steps that each takes there."""
    judged: int = 4
    """How often it is judged, evenly over its steps."""
    episodes: int = 100
    """Episodes of the game that judge it."""
    most_steps: int = 75
    """Steps after which an imagined episode is cut off: the limit of Basic."""
    rows: int = 16
    """Episodes at once while it learns."""
    denoise: Literal["none", "causal"] = "causal"
    """What is shown of imagined frames; the game's have no noise."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the agents that learn in each place, one after the other, and of their judgement."""
    threads: int | None = None
    """CPU threads; none: torch's choice."""
    device: str = DEVICE
    """Where the world is computed; agents learn on the CPU."""
    out: Path = Path("out/imagination.json")
    """Where the JSON goes, and the agents beside it."""

    def __post_init__(self) -> None:
        check_counts(self, "steps", "judged", "episodes", "most_steps", "rows")


def recorded_game(world: World) -> Callable[[], gym.Env[Any, Any]]:
    """Makes the game that a world learned from, as it was recorded.

    Raises:
        ValueError: if the world does not say which, or its frames are too small for `CnnPolicy`.
    """
    recipe = world.about.get("data", {}).get("recipe", {})
    if not {"env", "size", "frame_skip"} <= recipe.keys():
        raise ValueError(
            f"world: expected one that learned from a recording of `sfv-world collect`, got {world.name}, which does not say "
            "what its data is of."
        )
    if recipe["size"] < SMALLEST:
        raise ValueError(f"world: expected frames of at least {SMALLEST} pixels a side, got {recipe['size']}.")
    return partial(make_real, recipe["env"], size=recipe["size"], frame_skip=recipe["frame_skip"])


def judge(agent: PPO, game: Callable[[], gym.Env[Any, Any]], seed: int, config: ImaginationConfig) -> dict[str, float]:
    """What an agent earns in an episode of the game, how long it lasts and the part that ends before the limit."""
    env = VecMonitor(DummyVecEnv([game]))
    env.seed(seed)
    earned, lasted = evaluate_policy(agent, env, config.episodes, deterministic=False, return_episode_rewards=True)
    env.close()
    return {
        "earned": float(np.mean(earned)),
        "standard_error": float(np.std(earned, ddof=1) / len(earned) ** 0.5),
        "ended": float(np.mean(np.array(lasted) < config.most_steps)),
        "steps_lasted": float(np.mean(lasted)),
    }


def learn(place: VecEnv, seed: int, config: ImaginationConfig) -> Iterator[tuple[int, float | None, PPO]]:
    """Lets PPO learn in a place; gives the steps taken, what an episode there earned last, and the agent, now and then."""
    env = VecNormalize(VecMonitor(place), norm_obs=False)
    agent = PPO("CnnPolicy", env, n_steps=128, batch_size=256, n_epochs=4, ent_coef=0.01, seed=seed, device="cpu")
    yield 0, None, agent
    for _ in range(config.judged):
        agent.learn(config.steps // config.judged, reset_num_timesteps=False)
        episodes = agent.ep_info_buffer or []
        yield agent.num_timesteps, float(np.mean([episode["r"] for episode in episodes])), agent
    env.close()


def main(config: ImaginationConfig) -> None:
    """Learns, judges and writes."""
    set_threads(config.threads)
    report = Report(config.out, config, config.device)
    world = load_world(config.world, config.device).with_decoding(denoise=config.denoise)
    game, rows = recorded_game(world), Rows()
    for name, seed in product(config.places, config.seeds):
        if name == "world":
            options = {"max_episode_steps": config.most_steps, "autoreset_mode": "SameStep"}
            place: VecEnv = WorldVecEnv(WorldVectorEnv(config.rows, world=world, **options))
        else:
            place = DummyVecEnv([game] * config.rows)
        for steps, there, agent in learn(place, seed, config):
            judged = {f"{what}_in_the_game": value for what, value in judge(agent, game, seed, config).items()}
            rows.append({"learned_in": name, "seed": seed, "steps": steps, "earned_there": there, **judged})
            report.table("imagination", f"PPO, judged by {config.episodes} episodes of the game", rows)
        agent.save(config.out.with_name(f"ppo-{name}-{seed}.zip"))


if __name__ == "__main__":
    command(main, ImaginationConfig, __doc__)
