"""Reads a recording into memory and cuts clips out of it: Minari dataset -> `Episodes` -> batches of `Clips`.

Time is aligned to frames everywhere: `actions[t]` is taken at frame t, `rewards[t]` and `terminations[t]` arrive with
frame t. Numpy only; the training loop turns clips into tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from einops import reduce
from gymnasium.vector.utils import create_empty_array
from jaxtyping import Bool, Float, Float32, Int64, UInt8
from minari.dataset.minari_storage import MinariStorage

from sfv_world.control.spaces import action_size, flatten_actions
from sfv_world.data.images import REPEATED_SCREEN, image_key

Actions = Any
"""Actions of many frames: an array, or nested dicts and tuples of arrays like the action space; frames come first."""


def take(actions: Actions, index: Any) -> Actions:
    """Indexes every array of an action tree (nested dicts and tuples)."""
    if isinstance(actions, dict):
        return {name: take(part, index) for name, part in actions.items()}
    if isinstance(actions, tuple):
        return tuple(take(part, index) for part in actions)
    return actions[index]


@dataclass(frozen=True)
class Episodes:
    """Whole episodes, one after another in arrays with one row for each frame."""

    frames: UInt8[np.ndarray, "n h w 3"]
    """Every frame of every episode."""
    actions: Actions
    """Action taken at each frame; zeros at an episode's last frame, where none is taken."""
    rewards: Float32[np.ndarray, " n"]
    """Reward received on arriving at each frame; 0 at an episode's first."""
    terminations: Bool[np.ndarray, " n"]
    """Whether the episode terminated on arriving at each frame; a truncation is none."""
    repeated: Bool[np.ndarray, " n"]
    """Whether a frame is the previous screen again, because the game had none to show."""
    starts: Int64[np.ndarray, " e"]
    """Row of each episode's first frame."""
    observation_space: gym.Space[Any]
    action_space: gym.Space[Any]
    metadata: dict[str, Any] = field(default_factory=dict)
    """What the recording says of itself: "recipe" and "fps" where `sfv_world.data.collect` made it."""

    @property
    def ends(self) -> Int64[np.ndarray, " e"]:
        """Row after each episode's last frame."""
        return np.append(self.starts[1:], len(self.frames))

    @property
    def lengths(self) -> Int64[np.ndarray, " e"]:
        """Frames of each episode."""
        return self.ends - self.starts

    @property
    def fps(self) -> float | None:
        """Frames a second of game time, if the recording says."""
        return self.metadata.get("fps")

    def of_rows(self, rows: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        """Which episode each row is in."""
        return np.searchsorted(self.starts, rows, side="right") - 1

    def __len__(self) -> int:
        """Number of episodes."""
        return len(self.starts)

    def select(self, episodes: Int64[np.ndarray, " k"]) -> Episodes:
        """Copies the given episodes, in the given order."""
        rows = np.concatenate([np.arange(self.starts[k], self.ends[k]) for k in episodes])
        lengths = self.lengths[episodes]
        return Episodes(
            frames=self.frames[rows],
            actions=take(self.actions, rows),
            rewards=self.rewards[rows],
            terminations=self.terminations[rows],
            repeated=self.repeated[rows],
            starts=np.cumsum(lengths) - lengths,
            observation_space=self.observation_space,
            action_space=self.action_space,
            metadata=self.metadata,
        )

    def split(self, fraction: float, seed: int = 0, count: int | None = None) -> tuple[Episodes, Episodes]:
        """Splits whole episodes at random into those to train on and those held out.

        Args:
            fraction: part of the episodes that is held out, in (0, 1); each side has at least one episode.
            seed: seed of the choice.
            count: how many episodes are split, the first ones; later ones are on neither side. None: all.

        Returns:
            The training episodes and the held-out ones, both in their recorded order.

        Raises:
            ValueError: if there are fewer than two episodes or than `count`, or the fraction is out of range.
        """
        if not 0 < fraction < 1:
            raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction}.")
        count = len(self) if count is None else count
        if count < 2:
            raise ValueError(f"episodes: expected at least 2 to split, got {count}. Record more frames.")
        if len(self) < count:
            raise ValueError(
                f"episodes: expected at least {count}, the first of which are split, got {len(self)}. Give the whole recording, or "
                "continue it with `sfv-world collect`."
            )
        order = np.random.default_rng(seed).permutation(count)
        held_out = int(np.clip(round(fraction * count), 1, count - 1))
        return self.select(np.sort(order[held_out:])), self.select(np.sort(order[:held_out]))


def load_episodes(path: str | Path) -> Episodes:
    """Reads a whole Minari dataset with image observations into memory.

    Args:
        path: folder that `sfv_world.data.collect` wrote, or the `data` folder of any Minari dataset. Images may be the
            observation or its entry "screen", "image" or "pixels", RGB or gray.

    Raises:
        ValueError: if there is no dataset, it has no images or no episodes, or there is a step whose action is outside its space or
            whose reward is not finite.
    """
    path = Path(path)
    try:
        storage = MinariStorage.read(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"path: expected the folder of a Minari dataset, got {str(path)!r} ({error}). "
            "Record one with `sfv-world collect`."
        ) from error
    key = image_key(storage.observation_space)
    if key is None:
        raise ValueError(
            f"{path}: expected image observations (uint8, height x width x 3 or gray, alone or under 'screen', 'image' "
            f"or 'pixels'), got {storage.observation_space}. Record the environment with `sfv-world collect`, which "
            "renders it."
        )
    count = storage.total_episodes
    if count == 0:
        raise ValueError(
            f"{path}: expected at least one episode, got none. Continue the recording with `sfv-world collect`."
        )
    metadata = storage.metadata
    total = storage.total_steps + count
    frames: np.ndarray | None = None
    actions = create_empty_array(storage.action_space, total, np.zeros)
    rewards = np.zeros(total, np.float32)
    terminations = np.zeros(total, bool)
    repeated = np.zeros(total, bool)
    starts = np.zeros(count, np.int64)
    row = 0
    for k, episode in enumerate(_whole(path, storage.get_episodes(range(count)))):
        images = _rgb(episode["observations"][key] if key else episode["observations"])
        if frames is None:
            frames = np.empty((total, *images.shape[1:]), np.uint8)
        end = row + len(images)
        if end > total:
            break
        starts[k] = row
        frames[row:end] = images
        _fill(actions, slice(row, end - 1), episode["actions"])
        rewards[row + 1 : end] = episode["rewards"]
        terminations[row + 1 : end] = episode["terminations"]
        repeated[row:end] = (episode["infos"] or {}).get(REPEATED_SCREEN, False)
        row = end
    if frames is None or row != total:
        raise ValueError(f"{path}: expected {total} frames, as its metadata says, got others. Copy or record it again.")
    episodes = Episodes(
        frames=frames,
        actions=actions,
        rewards=rewards,
        terminations=terminations,
        repeated=repeated,
        starts=starts,
        observation_space=storage.observation_space,
        action_space=storage.action_space,
        metadata={name: metadata[name] for name in ("dataset_id", "recipe", "fps") if name in metadata},
    )
    _check_steps(path, episodes)
    return episodes


def _whole(path: Path, episodes: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Episodes as they are read; a ValueError where one cannot be."""
    try:
        yield from episodes
    except (KeyError, OSError) as error:
        raise ValueError(
            f"{path}: expected whole episodes, got some that cannot be read ({error}). Copy or record it again."
        ) from error


def _check_steps(path: Path, data: Episodes) -> None:
    """Raises a ValueError at the first episode with an action outside its space or a reward that is not finite."""

    def problem(first: int, end: int) -> str:
        try:
            flatten_actions(data.action_space, take(data.actions, slice(first, end)), (end - first,), "action")
        except ValueError as error:
            return str(error)
        return ""

    action_size(data.action_space)  # raises, if worlds take none of such actions
    for k, (start, last) in enumerate(zip(data.starts.tolist(), (data.ends - 1).tolist(), strict=True)):
        if problem(start, last):
            row = next(row for row in range(start, last) if problem(row, row + 1))
            raise ValueError(
                f"{path}, episode {k}, step {row - start}: {problem(row, row + 1)} Record again with actions clipped to it, or "
                "correct this one."
            )
        for step in np.flatnonzero(~np.isfinite(data.rewards[start + 1 : last + 1])):
            raise ValueError(
                f"{path}, episode {k}, step {step}: reward: expected a finite number, got {data.rewards[start + 1 + step]}. "
                "Record again without such rewards, or correct this one."
            )


@dataclass(frozen=True)
class Clips:
    """A batch of equally long pieces of episodes; those that run past an episode's end repeat its last frame."""

    frames: UInt8[np.ndarray, "b t h w 3"]
    """Frames."""
    actions: Actions
    """Actions between the frames, (b, t-1, ...); the last one again where padded."""
    rewards: Float32[np.ndarray, "b t"]
    """Reward received on arriving at each frame; 0 where padded."""
    terminations: Bool[np.ndarray, "b t"]
    """Whether the episode terminated on arriving at each frame; false where padded."""
    valid: Bool[np.ndarray, "b t"]
    """Whether a frame was recorded, rather than padded."""
    terminal: Bool[np.ndarray, "b t"]
    """Whether a frame is an ended game's last screen again: a target for reward and termination, not for pixels.

    That is how every Doom episode ends, be it by termination or by truncation."""


@dataclass(frozen=True)
class ClipSampler:
    """Draws batches of clips, each starting at a frame chosen uniformly from all frames.

    So a clip's first frame is rarely an episode's first, and a model learns to begin anywhere. Because clips may run
    past the end of an episode, its last frame is drawn as often as one in its middle, and so are terminations.

    Example:
        >>> episodes = load_episodes("data/doom-basic")  # doctest: +SKIP
        >>> sampler = ClipSampler(episodes, clip_length=16, batch_size=8, seed=0)  # doctest: +SKIP
        >>> sampler.batch(0).frames.shape  # doctest: +SKIP
        (8, 16, 64, 64, 3)
    """

    episodes: Episodes
    clip_length: int
    """Frames of a clip."""
    batch_size: int
    """Clips of a batch."""
    seed: int = 0
    """With the step, this decides the batch."""
    busy: float = 0.0
    """Part of the clips that begin where something just moved a lot, drawn in proportion to `moved`. The frames whose change
    decided, a clip's first two, then count as padding: what is learned of the others is what it would be of any clip."""

    def __post_init__(self) -> None:
        if not 0 <= self.busy <= 1:
            raise ValueError(f"busy: expected 0 to 1, got {self.busy}.")
        for name in ("clip_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")

    def batch(self, step: int, share: slice = slice(None)) -> Clips:
        """Draws the clips of a step: a pure function of (seed, step), so training continues exactly as it was.

        Args:
            step: which batch.
            share: which of its clips to cut.
        """
        rng = np.random.default_rng([self.seed, step])
        rows = rng.integers(len(self.episodes.frames), size=self.batch_size)
        if not self.busy:
            return self.clips(rows[share])
        busy = rng.random(self.batch_size) < self.busy
        chances = np.cumsum(self.moved)
        second = np.searchsorted(chances, rng.random(self.batch_size) * chances[-1], side="right")
        clips = self.clips(np.where(busy, second - 1, rows)[share])
        return replace(clips, valid=clips.valid & ~(busy[share, None] & (np.arange(self.clip_length) < 2)))

    @cached_property
    def moved(self) -> Float[np.ndarray, " n"]:
        """How much the busiest cell of 8 x 8 pixels changed from the frame before: the mean square, in grey levels.

        A missile changes a few cells a lot, a moving view all of them a little. 0 for the first frames of episodes.
        """
        frames, moved = self.episodes.frames, np.full(len(self.episodes.frames), 1e-6)
        for first in range(1, len(frames), 256):
            part = frames[first - 1 : first + 256].astype(np.float32)
            change = np.square(np.diff(part, axis=0)).mean(-1)
            i, j = min(8, change.shape[1]), min(8, change.shape[2])
            whole = change[:, : change.shape[1] // i * i, : change.shape[2] // j * j]
            moved[first : first + len(change)] += reduce(whole, "n (r i) (c j) -> n r c", "mean", i=i, j=j).max((1, 2))
        moved[self.episodes.starts] = 0
        return moved

    def clips(self, rows: Int64[np.ndarray, " b"]) -> Clips:
        """Cuts the clips that start at the given rows of the episodes."""
        data = self.episodes
        last = data.ends[data.of_rows(rows)] - 1
        wanted = rows[:, None] + np.arange(self.clip_length)
        valid = wanted <= last[:, None]
        index = np.minimum(wanted, last[:, None])
        return Clips(
            frames=data.frames[index],
            # An episode's last row holds no action, but zeros, which the space may not contain.
            actions=take(data.actions, np.minimum(index[:, :-1], last[:, None] - 1)),
            rewards=np.where(valid, data.rewards[index], np.float32(0)),
            terminations=data.terminations[index] & valid,
            valid=valid,
            terminal=data.repeated[index] & valid,
        )


def _rgb(images: np.ndarray) -> UInt8[np.ndarray, "t h w 3"]:
    if images.ndim == 3:
        images = images[..., None]
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _fill(target: Actions, rows: slice, source: Actions) -> None:
    """Copies an episode's actions into their rows of a tree of arrays."""
    if isinstance(target, dict):
        for key in target:
            _fill(target[key], rows, source[key])
    elif isinstance(target, tuple):
        for part, value in zip(target, source, strict=True):
            _fill(part, rows, value)
    else:
        target[rows] = source
