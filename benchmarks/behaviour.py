"""Does a Doom world behave like Doom? Random play in it beside random play in the game, and what actions do to the view.

    python benchmarks/behaviour.py --world doom-basic --data data/doom-basic

Prints what it found as JSON and writes it to `behaviour.json`: with the usual options in the world's folder, else in `--out`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pydantic import TypeAdapter
from report import command
from tqdm import tqdm

from sfv_world.agents.policies import HeldRandomPolicy
from sfv_world.checkpoint import replacing
from sfv_world.data.clips import ClipSampler, Episodes
from sfv_world.evaluation import split_as_trained
from sfv_world.film import imagine, long_clips
from sfv_world.given import check_folder
from sfv_world.loading import load_world
from sfv_world.world import World

FOUND = "behaviour.json"
STEPS = {"doom-takecover": 150}
"""Steps of random play within which most episodes of a game end, where that is not 75, the limit of Basic."""
MOVED = 40.0
"""Mean square difference, in levels, of a view that moved."""
MOVES: dict[str, dict[str, Callable[[np.ndarray], np.ndarray]]] = {
    "doom-basic": {"right": lambda actions: actions == 2, "left": lambda actions: actions == 3},
    "doom-takecover": {"right": lambda actions: actions == 1, "left": lambda actions: actions == 2},
    "doom-camera": {
        "turn right": lambda actions: actions[:, 0] > 0.5,
        "turn left": lambda actions: actions[:, 0] < -0.5,
        "ahead": lambda actions: actions[:, 1] > 0.5,
        "back": lambda actions: actions[:, 1] < -0.5,
    },
}
"""Which actions of a game move the view, and how."""


@dataclass(frozen=True)
class BehaviourConfig:
    """What to play."""

    world: str
    """Name of a shipped world, or its folder."""
    data: Path
    """The recording it was trained on."""
    episodes: int = 240
    """Episodes of random play to imagine."""
    rows: int = 48
    """Clips of each other check."""
    steps: int | None = None
    """Most steps of an episode of random play; none: what `STEPS` says of the game, or 75."""
    seed: int = 0
    """Seed of everything."""
    out: Path | None = None
    """Folder for what was found; none: the world's own, which keeps what the usual options find."""


def game_of(episodes: Episodes) -> str:
    """What was recorded."""
    return episodes.metadata.get("recipe", {}).get("env", "")


def random_play(world: World, train: Episodes, held_out: Episodes, config: BehaviourConfig) -> dict[str, Any]:
    """Episodes of held random actions from held-out beginnings, again and again: how they end, how long they last, what they earn.

    The game's are all that were recorded, since none of them can tell the world how it goes on from others; on both sides only
    those that outlast the frames which the world reads first.
    """
    context, rows = 4, config.episodes
    most = STEPS.get(game_of(train), 75) if config.steps is None else config.steps
    beginnings = held_out.starts[held_out.lengths > context]
    clips = ClipSampler(held_out, context, rows).clips(np.resize(beginnings, rows))
    state = world.reset(clips.frames, clips.actions, seeds=config.seed + np.arange(rows))
    policies = [HeldRandomPolicy(world.action_space, (1, 8), seed=config.seed + row) for row in range(rows)]
    alive, length, earned, ended = (
        np.ones(rows, bool),
        np.full(rows, context - 1),
        clips.rewards.sum(1),
        np.zeros(rows, bool),
    )
    for _ in tqdm(range(most - context + 1), desc="random play"):
        state, output = world.step(state, np.array([policy(None) for policy in policies]))
        length[alive] += 1
        earned[alive] += output.reward.cpu().numpy()[alive]
        ended |= alive & output.terminated.cpu().numpy()
        alive &= ~output.terminated.cpu().numpy()
    real = np.concatenate([_real_play(episodes, context, most) for episodes in (train, held_out)])
    found: dict[str, Any] = {"steps": most}
    for name, play in ("imagined", np.stack([ended, length, earned], axis=1)), ("real", real):
        mean, error = play.mean(0), play.std(0) / len(play) ** 0.5
        parts = zip(("ended", "steps", "return"), mean, error, strict=True)
        found[name] = {"episodes": len(play)} | {what: {"mean": m, "error": e} for what, m, e in parts}
    return found


def _real_play(episodes: Episodes, context: int, most: int) -> np.ndarray:
    """Whether each real episode ended within so many steps, how many of them it lasted and what it earned in them, (n, 3)."""
    inside = np.arange(len(episodes.frames)) - np.repeat(episodes.starts, episodes.lengths) <= most
    ended = np.add.reduceat(episodes.terminations & inside, episodes.starts)
    earned = np.add.reduceat(episodes.rewards * inside, episodes.starts)
    told = np.stack([ended, np.minimum(episodes.lengths - 1, most), earned], axis=1)
    return told[episodes.lengths > context]


def coarse(frames: np.ndarray) -> np.ndarray:
    """What is above the weapon, without the grain: texture that is imagined differs, where the walls are does not."""
    return np.stack([cv2.GaussianBlur(frame[:40].astype(np.float32), (0, 0), 1.5) for frame in frames])


def held_moves(
    world: World,
    held_out: Episodes,
    moves: dict[str, Callable[[np.ndarray], np.ndarray]],
    config: BehaviourConfig,
) -> dict[str, dict[str, float]]:
    """How far the view gets while a move is held for six steps: the real step that the last imagined frame is nearest to.

    Of clips in which the real view moves; an imagined one that moves as far is nearest to the sixth, one that stays to step 0.
    """
    context, held, found = 8, 6, {}
    for name, is_it in moves.items():
        moving = is_it(np.asarray(held_out.actions))
        starts = [
            start
            for first, end in zip(held_out.starts, held_out.ends, strict=True)
            for start in range(first, end - context - held - 1)
            if moving[start + context - 1 : start + context - 1 + held].all()
        ]
        chosen = np.random.default_rng(config.seed).permutation(starts)[: config.rows]
        clips = ClipSampler(held_out, context + held, len(chosen)).clips(chosen)
        imagined = imagine(world, clips, context, config.seed).imagined
        steps = []
        for real, ours in zip(clips.frames[:, context - 1 :], imagined, strict=True):
            real = coarse(real)
            if np.square(real[-1] - real[0]).mean() > MOVED:
                steps.append(np.square(real - coarse(ours[-1:])).mean((1, 2, 3)).argmin())
        found[name] = {"nearest_step": float(np.mean(steps)), "of": held, "clips": len(steps)}
    return found


def monsters(frames: np.ndarray) -> np.ndarray:
    """How many figures stand before the far wall of Take Cover, and which part of it is in view, (2, n)."""
    colours = frames.astype(np.float32)
    light, tint = colours.mean(-1), colours[..., 0] - colours[..., 2]
    far = (tint[:, 20:24].mean(1) < 12) & (tint[:, 44:48].mean(1) < 12)  # grey above and below: no wall at the side
    dark = far & (light[:, 29:34].min(1) < 35)
    return np.stack([(dark[:, 1:] & ~dark[:, :-1]).sum(1) + dark[:, 0], far.mean(1)])


def population(world: World, held_out: Episodes, config: BehaviourConfig) -> dict[str, list[float]]:
    """Monsters in a full view of Take Cover, in tens of steps: in the game, and imagined from its frames, under its actions."""
    context, steps = 8, 60
    starts = np.random.default_rng(config.seed).permutation(np.flatnonzero(held_out.lengths > context + steps))
    clips = ClipSampler(held_out, context + steps, len(starts)).clips(held_out.starts[starts][: config.rows])
    imagined = imagine(world, clips, context, config.seed).imagined
    found = {}
    for name, frames in ("real", clips.frames[:, context:]), ("imagined", imagined):
        tens = (monsters(part.reshape(-1, *frames.shape[2:])).sum(1) for part in np.split(frames, steps // 10, axis=1))
        found[name] = [float(figures / views) for figures, views in tens]
    return found


def endings(world: World, held_out: Episodes, config: BehaviourConfig) -> dict[str, float]:
    """Imagined rollouts of the last moments of real episodes and of moments that nothing came of, under the real actions.

    Some clips stop where the real episode ended: how likely is it that the imagined one ends within its last three steps, and how
    likely that one ends where the real one went on?
    """
    context, ahead = 8, 6
    ends = np.flatnonzero(held_out.terminations)
    starts = np.repeat(held_out.starts, held_out.lengths)
    ends = ends[ends - starts[ends] >= context + ahead][: config.rows]
    clips = ClipSampler(held_out, context + ahead, len(ends)).clips(ends - context - ahead + 1)
    outputs = imagine(world, clips, context, config.seed).outputs
    chance = 1 - np.prod([1 - output.termination_probability.cpu().numpy() for output in outputs[-3:]], axis=0)
    last = outputs[-1].rewards[:, 1].cpu().numpy()
    other = long_clips(held_out, config.rows, context + ahead, config.seed)
    quiet = imagine(world, other, context, config.seed).outputs
    false = 1 - np.prod([1 - output.termination_probability.cpu().numpy() for output in quiet[-3:]], axis=0)
    return {
        "ends_where_the_game_ended": float(chance.mean()),
        "ends_where_the_game_went_on": float(false.mean()),
        "reward_at_the_end": float(last.mean()),
        "real_reward_at_the_end": float(clips.rewards[:, -1].mean()),
        "clips": len(ends),
    }


def main(config: BehaviourConfig) -> dict[str, Any]:
    """Runs all checks of one world.

    Raises:
        ValueError: if what was found cannot be written, or would replace what the usual options found.
    """
    world = load_world(config.world)
    unusual = replace(config, out=None) != BehaviourConfig(config.world, config.data)
    if unusual and config.out is None:
        raise ValueError(
            f"out: expected a folder for what these options find, as {FOUND} of {world.name} is of the usual ones, got none. "
            "Name one (--out)."
        )
    folder = config.out or Path(world.folder or ".")
    check_folder("out", folder)
    train, held_out = split_as_trained(world, config.data)
    found: dict[str, Any] = {"measured": TypeAdapter(BehaviourConfig).dump_python(config, mode="json", exclude={"out"})}
    found["random_play"] = random_play(world, train, held_out, config)
    if held_out.terminations.any():
        found["endings"] = endings(world, held_out, config)
    game = game_of(held_out)
    if game in MOVES:
        found["held_moves"] = held_moves(world, held_out, MOVES[game], config)
    if game == "doom-takecover":
        found["monsters"] = population(world, held_out, config)
    print(json.dumps(found, indent=2))
    with replacing(folder / FOUND) as beside:
        beside.write_text(json.dumps(found, indent=2) + "\n")
    return found


if __name__ == "__main__":
    command(main, BehaviourConfig, __doc__)
