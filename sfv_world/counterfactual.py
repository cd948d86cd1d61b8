"""Counterfactuals: what would have happened in a real episode, had one acted otherwise.

A flow turns a real trajectory into noise, exactly: `World.abduct`. Decoding that noise with the same actions gives the
trajectory back; with one action changed, it gives what the same chance would have made of the other action: abduction,
action, prediction (Pearl, Causality, 2nd ed., section 7.1).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from einops import rearrange
from gymnasium import spaces
from jaxtyping import UInt8
from tqdm import tqdm

from sfv_world.control.spaces import flatten_actions
from sfv_world.data.clips import Actions, take
from sfv_world.evaluation import split_as_trained
from sfv_world.film import check_film, long_clips, write_image, write_video
from sfv_world.given import DEVICE, check_counts, check_seed
from sfv_world.loading import load_world
from sfv_world.state import WorldOutput
from sfv_world.world import Abduction, World

MARK = np.array([255, 64, 64], np.uint8)
"""Colour of the line above frames that the changed action leads to."""
SHEET = 16
"""Frames of a contact sheet, at most."""


@dataclass(frozen=True)
class CounterfactualConfig:
    """What to change in which episodes."""

    world: str
    """Name of a shipped world, or its folder."""
    data: Path
    """The recording it was trained on; its held-out episodes are found by the run's own split."""
    out: Path = Path("out/counterfactual")
    """Folder of the film `counterfactual.mp4` and the contact sheet `counterfactual.png`."""
    frames: int = 32
    """Frames after the context; up to whole steps, where those have several frames."""
    context: int = 8
    """Real frames the world reads first; up to whole steps."""
    change_at: int = 8
    """Number, from 0, of the frame after the context that the changed action leads to first."""
    action: str | None = None
    """The other action as JSON, such as 2 or [0, 1]; none: for each row, a random one that was not taken."""
    hold: int = 8
    """Frames for which the changed action is held."""
    rows: int = 4
    """Clips of held-out episodes."""
    seed: int = 0
    """Seed of the choice of clips, of the noise added to them and of random actions."""
    device: str = DEVICE
    """Where to compute."""

    def __post_init__(self) -> None:
        check_counts(self, "frames", "context", "hold", "rows")
        check_seed(self.seed)
        if not 0 <= self.change_at < self.frames:
            raise ValueError(
                f"change_at: expected one of the {self.frames} frames after the context, 0 to {self.frames - 1}, "
                f"got {self.change_at}. Ask for more frames, or change one earlier."
            )


def replay(world: World, abduction: Abduction, actions: Actions) -> Iterator[WorldOutput]:
    """Decodes the noise of real trajectories again, under actions of one's choice.

    Args:
        world: the world that the noise was abducted with.
        abduction: where to begin and the noise; stays as it is, for other replays.
        actions: the B x N actions that lead to the N frames after the context; None where the model shall not know them.

    Returns:
        What the world says of each step, in turn.

    Raises:
        ValueError: if the noise is another world's, decoding is guided or looks ahead, or the actions are not of the space.
    """
    if abduction.state.world != world.checksum:
        raise ValueError(
            f"abduction: expected one of the world {world.name} (checksum {world.checksum}), got one of checksum "
            f"{abduction.state.world}. Noise means other frames to another world: abduct with the one that replays."
        )
    if world.decoding.guidance:
        raise ValueError(
            f"guidance: expected 0, got {world.decoding.guidance}. Guided frames are made of other fields than those that the "
            "noise was abducted with: replay without guidance."
        )
    if world.decoding.denoise == "lookahead":
        raise ValueError(
            "denoise: expected 'none' or 'causal', got 'lookahead'. Look-ahead tells of every frame one step later, and of "
            "the last one never: abduct and replay without it."
        )
    if actions is not None:
        flatten_actions(world.action_space, actions, tuple(abduction.frames.shape[:2]))
    return _decode(world, abduction, actions)


def _decode(world: World, abduction: Abduction, actions: Actions) -> Iterator[WorldOutput]:
    state = abduction.state[:]
    for n in range(abduction.noise.shape[1]):
        action = None if actions is None else take(actions, np.s_[:, n * world.time : (n + 1) * world.time])
        state, output = world.step(state, action, abduction.noise[:, n], held=False)
        yield output


def changed_actions(actions: Actions, others: list[Any], at: int, hold: int) -> Actions:
    """A copy of actions (B, N, ...) in which row b takes `others[b]` from number `at` on, `hold` times."""
    copy = take(actions, np.arange(len(others)))
    for row, action in enumerate(others):
        _put(copy, (row, slice(at, at + hold)), action)
    return copy


def parse_action(space: gym.Space[Any], text: str) -> Any:
    """An action of a space, as JSON has it: a number, a list (of a Tuple's parts, too) or an object.

    Raises:
        ValueError: if it is no JSON, or no action of the space.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"action: expected an action of {space} as JSON, such as 1 or [0, 1], got {text!r}."
        ) from error
    flatten_actions(space, value, (), "action")
    return _element(space, value)


def counterfactual(config: CounterfactualConfig) -> Path:
    """Prints the log-likelihoods of both branches, and writes a film and a contact sheet.

    From left to right (in the contact sheet from above): the real frames; the same noise and the same actions; the same
    noise and, for some frames (marked by a red line), another action. The branches' frames are noised as the world sees them.
    """
    world = load_world(config.world, config.device).with_decoding(denoise="none")
    time, whole = world.time, world.model.codec.whole
    config = replace(config, context=whole(config.context), frames=whole(config.frames + 1) - 1)
    height, width, _ = world.frame_shape
    check_film(config.rows * height, 3 * width)
    wanted = None if config.action is None else parse_action(world.action_space, config.action)
    held_out = split_as_trained(world, config.data)[1]
    clips = long_clips(held_out, config.rows, config.context + config.frames, config.seed)
    after = take(clips.actions, np.s_[:, config.context - 1 :])
    others = _others(world.action_space, after, wanted, config)
    changed = changed_actions(after, others, config.change_at, config.hold)

    print("abducting", flush=True)
    seeds = config.seed * 100_003 + np.arange(config.rows)
    abduction = world.abduct(clips.frames, clips.actions, seeds, config.context)
    same, other = [], []
    both = zip(replay(world, abduction, after), replay(world, abduction, changed), strict=True)
    print("log-likelihood in nats, mean of the rows; differences in levels of 255")
    print("frame     observed  same action  other action  same - observed  other - same")
    for n, (one, two) in enumerate(tqdm(both, total=config.frames // time, desc="both branches", unit="step")):
        same.append(one)
        other.append(two)
        a, b = one.frames.int(), two.frames.int()
        observed = abduction.frames[:, n * time : (n + 1) * time].reshape(a.shape).int()
        tqdm.write(
            f"{n * time:5d}  {abduction.log_likelihood[:, n].mean():11.1f}  {one.log_likelihood.mean():11.1f}  "
            f"{two.log_likelihood.mean():12.1f}  {(a - observed).abs().max().item():15d}  "
            f"{(b - a).abs().float().mean():12.2f}"
        )
    seen = abduction.frames.cpu().numpy()
    films = [
        torch.stack([output.frames for output in branch], dim=1).cpu().numpy().reshape(seen.shape)
        for branch in (same, other)
    ]
    apart = np.abs(films[0].astype(np.int16) - seen)
    print(
        f"same action: {(apart == 0).mean():.2%} of the colour values as observed, the others within {apart.max()}; "
        f"largest certificate {max(output.certificate.max().item() for output in same):.1e}"
    )
    held = min(config.hold, seen.shape[1] - config.change_at)
    print(f"other actions: {', '.join(map(str, others))} for {held} frames from {config.change_at} on")
    return _write(config, clips.frames[:, config.context :], films[0], films[1], world.fps)


def _others(space: gym.Space[Any], after: Actions, wanted: Any, config: CounterfactualConfig) -> list[Any]:
    """Each row's other action: the one wanted, or a random one that it did not take."""
    taken = [
        flatten_actions(space, take(after, np.s_[row, config.change_at]), ()).tolist() for row in range(config.rows)
    ]
    if wanted is not None:
        if all(flatten_actions(space, wanted, ()).tolist() == vector for vector in taken):
            raise ValueError(f"action: expected one that some row did not take, got {wanted}, which all of them did.")
        return [wanted] * config.rows
    space.seed(config.seed)
    others = []
    for vector in taken:
        draws = (space.sample() for _ in range(1000))
        other = next((draw for draw in draws if flatten_actions(space, draw, ()).tolist() != vector), None)
        if other is None:
            raise ValueError(f"action: expected a space of at least two actions, got {space}.")
        others.append(other)
    return others


def _write(
    config: CounterfactualConfig,
    real: UInt8[np.ndarray, "b n h w 3"],
    same: UInt8[np.ndarray, "b n h w 3"],
    other: UInt8[np.ndarray, "b n h w 3"],
    fps: float,
) -> Path:
    other = other.copy()
    other[:, config.change_at : config.change_at + config.hold, 0] = MARK
    film = np.stack([real, same, other], axis=1)
    write_video(config.out / "counterfactual.mp4", rearrange(film, "b three n h w c -> n (b h) (three w) c"), fps)
    chosen = film[:, :, np.unique(np.linspace(0, config.frames - 1, SHEET).astype(int))]
    write_image(config.out / "counterfactual.png", rearrange(chosen, "b three n h w c -> (b three h) (n w) c"))
    print(
        f"wrote {config.out / 'counterfactual.mp4'} and {config.out / 'counterfactual.png'}: real, same, other action"
    )
    return config.out


def _put(tree: Actions, index: Any, action: Any) -> None:
    """Sets entries of every array of an action tree to one action."""
    if isinstance(tree, dict):
        for name, part in tree.items():
            _put(part, index, action[name])
    elif isinstance(tree, tuple):
        for part, value in zip(tree, action, strict=True):
            _put(part, index, value)
    else:
        tree[index] = action


def _element(space: gym.Space[Any], value: Any) -> Any:
    """A value that JSON can say, as an action of the space; `flatten_actions` has checked it."""
    match space:
        case spaces.Dict():
            return {name: _element(part, value[name]) for name, part in space.spaces.items()}
        case spaces.Tuple():
            return tuple(_element(part, item) for part, item in zip(space.spaces, value, strict=True))
    return np.asarray(value, space.dtype) if space.shape else value
