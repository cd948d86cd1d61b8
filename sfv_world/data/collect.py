"""Records a real environment into a Minari dataset: environment -> episodes -> a folder that Minari reads.

Episode k depends on the configuration and k alone (its seeds are derived from both), so a run that continues another
records what one uninterrupted run would have. (A Doom engine keeps some state for show across episodes, so there a few
pixels of a rare frame may differ.)

A killed run leaves a readable dataset. HDF5 files are not safe to append to, so none ever is: episodes are written by
Minari's own storage into a new file, `parts/NNNNNN.hdf5`, and `main_data.hdf5` is a small index of HDF5 external links,
one for each episode. The part, the index and `metadata.json` are each written beside their place and moved there in
this order, and `metadata.json` alone says how many episodes count. Whatever a killed run had begun is overwritten by
the next.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector.utils import concatenate, create_empty_array
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import METADATA_FILE_NAME, MinariStorage
from tqdm import tqdm

from sfv_world.agents.policies import Policy, load_policy
from sfv_world.data.images import REPEATED_SCREEN
from sfv_world.envs.real import make_real
from sfv_world.given import alone_in, check_counts, check_seed
from sfv_world.interrupt import patient

INDEX_FILE_NAME = "main_data.hdf5"
RECIPE_VERSION = 1
"""Changes when the same configuration would record something else."""


@dataclass(frozen=True)
class CollectConfig:
    """What to record, and where."""

    env: str
    """Real environment: doom-basic, doom-takecover, doom-camera, or the id of any Gymnasium environment with images."""
    out: Path
    """Folder of the dataset. If it holds a recording of the same configuration, that is continued."""
    frames: int = 50_000
    """Frames the dataset has at least when done; the last episode is always complete."""
    size: int = 64
    """Height and width of the frames, in pixels."""
    frame_skip: int = 4
    """Game steps each action is held for."""
    policy: str = "random"
    """Who acts: random, or the path of a saved Stable-Baselines3 agent (.zip)."""
    hold: tuple[int, int] = (1, 8)
    """Least and greatest number of steps a random action is held."""
    seed: int = 0
    """Seed of the whole recording."""
    max_episode_steps: int | None = None
    """Steps after which an episode is truncated; none: only the environment ends it."""
    frames_per_write: int = 4096
    """Frames kept in memory between writes; a killed run loses at most these and the episode in progress, one that Ctrl-C ends
    only that. Whatever is lost, the same command records again."""

    def __post_init__(self) -> None:
        check_counts(self, "frames", "frames_per_write", "max_episode_steps")
        check_seed(self.seed)

    def recipe(self) -> dict[str, Any]:
        """Everything that decides what an episode holds; kept in the dataset's metadata."""
        recipe = {key: value for key, value in asdict(self).items() if key not in ("out", "frames", "frames_per_write")}
        return {**recipe, "hold": list(self.hold), "version": RECIPE_VERSION}


def collect(config: CollectConfig) -> Path:
    """Records episodes until the dataset has the configured number of frames, continuing what its folder holds already.

    Observations are stored without loss. `infos` has one entry, "repeated_screen": whether a frame is the previous
    screen again (see `sfv_world.envs.real`). Everything else is as Minari has it.

    Returns:
        The dataset's folder: `minari.MinariDataset(folder)` and `sfv_world.data.clips.load_episodes(folder)` read it.

    Raises:
        ValueError: if the folder holds something else, or the environment or the policy does not exist.
    """
    config = replace(config, out=config.out.resolve())  # Minari joins relative paths twice
    with alone_in(config.out), closing(make_real(config.env, size=config.size, frame_skip=config.frame_skip)) as env:
        policy = load_policy(config.policy, env, hold=config.hold)
        _open_dataset(config, env)
        episodes, frames = _progress(config.out)
        buffers: list[EpisodeBuffer] = []
        described = {"unit": "frame", "desc": str(config.out)}
        with patient() as interrupted, tqdm(total=config.frames, initial=frames, **described) as bar:
            while frames < config.frames:
                episode = record_episode(env, policy, config, episodes + len(buffers), interrupted)
                if episode is not None:
                    buffers.append(episode)
                    frames += len(episode) + 1
                    bar.update(len(episode) + 1)
                kept, stop = sum(len(buffer) + 1 for buffer in buffers), interrupted()
                if buffers and (frames >= config.frames or kept >= config.frames_per_write or stop):
                    _append(config.out, buffers)
                    episodes, buffers = episodes + len(buffers), []
                if stop:
                    bar.write(f"stopped: {config.out} keeps {episodes} episodes; the same command goes on")
                    raise KeyboardInterrupt
    return config.out


def record_episode(
    env: gym.Env[np.ndarray, Any],
    policy: Policy,
    config: CollectConfig,
    index: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> EpisodeBuffer | None:
    """Plays one episode; with the random policy it is a pure function of (config, index). None if it was `interrupted`."""
    env_seed, policy_seed = (int(seed) for seed in np.random.SeedSequence([config.seed, index]).generate_state(2))
    policy.reset(policy_seed)
    frame, info = env.reset(seed=env_seed)
    frames, repeated = [frame], [bool(info.get(REPEATED_SCREEN, False))]
    actions: list[Any] = []
    rewards: list[float] = []
    terminations: list[bool] = []
    truncations: list[bool] = []
    done = False
    while not done:
        if interrupted():
            return None
        action = policy(frame)
        frame, reward, terminated, truncated, info = env.step(action)
        truncated = truncated or (not terminated and len(actions) + 1 == config.max_episode_steps)
        frames.append(frame)
        actions.append(action)
        rewards.append(float(reward))
        terminations.append(bool(terminated))
        truncations.append(bool(truncated))
        repeated.append(bool(info.get(REPEATED_SCREEN, False)))
        done = terminated or truncated
    empty = create_empty_array(env.action_space, len(actions))
    assert empty is not None
    return EpisodeBuffer(
        seed=env_seed,
        observations=np.stack(frames),
        actions=concatenate(env.action_space, actions, empty),
        rewards=np.array(rewards),
        terminations=np.array(terminations),
        truncations=np.array(truncations),
        infos={REPEATED_SCREEN: np.array(repeated)},
    )


def _open_dataset(config: CollectConfig, env: gym.Env[np.ndarray, Any]) -> None:
    """Creates the dataset with no episodes, or makes sure that what is there is a recording of this configuration."""
    out = config.out
    if (out / METADATA_FILE_NAME).exists():
        recorded = MinariStorage.read_raw_metadata(out).get("recipe", {})
        differing = [
            f"{key}: expected {recorded.get(key)!r}, got {value!r}"
            for key, value in config.recipe().items()
            if recorded.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"out: {str(out)!r} holds a recording of another configuration ({'; '.join(differing)}). "
                "Choose another folder or delete it."
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(
            f"out: expected a new folder or a dataset, got {str(out)!r}, which holds other files. "
            "Choose another folder."
        )
    staging = _fresh_folder(out.with_name(f".{out.name}.new"))
    spec = EnvSpec(
        id="sfv_world/Real-v0",
        entry_point="sfv_world.envs.real:make_real",
        kwargs={"env_id": config.env, "size": config.size, "frame_skip": config.frame_skip},
    )
    MinariStorage.new(staging, env.observation_space, env.action_space, env_spec=spec, jpeg_encoding=False)
    h5py.File(staging / INDEX_FILE_NAME, "w").close()
    fps = env.metadata.get("render_fps")
    _update_metadata(
        staging,
        dataset_id=f"sfv-world/{re.sub(r'[^-_a-zA-Z0-9]', '-', out.name)}-v0",
        minari_version=version("minari"),
        algorithm_name=config.policy,
        recipe=config.recipe(),
        fps=fps / config.frame_skip if fps else None,
    )
    staging.rename(out)


def _append(out: Path, buffers: list[EpisodeBuffer]) -> None:
    """Adds whole episodes to the dataset: part, index, metadata, each moved into place complete."""
    episodes, frames = _progress(out)
    needed, free = 2 * sum(np.asarray(buffer.observations).nbytes for buffer in buffers), shutil.disk_usage(out).free
    if needed > free:  # told before HDF5 finds out, which does not survive it
        raise OSError(f"{out}: expected room for {needed / 1e6:.0f} MB, found {free / 1e6:.0f} MB free")
    storage = MinariStorage.read(out)
    writing = _fresh_folder(out / ".writing")
    written = MinariStorage.new(writing, storage.observation_space, storage.action_space, jpeg_encoding=False)
    written.update_episodes(buffers)
    part = out / "parts" / f"{episodes:06d}.hdf5"
    part.parent.mkdir(exist_ok=True)
    with h5py.File(writing / INDEX_FILE_NAME) as source, h5py.File(writing / "part", "w") as target:
        _compress(source, target, first_episode=episodes)
    shutil.copy(out / INDEX_FILE_NAME, writing / "index")
    with h5py.File(writing / "index", "a") as index:
        for name in [name for name in index if int(name.removeprefix("episode_")) >= episodes]:
            del index[name]  # of a run that was killed before it could count them
        for k in range(episodes, episodes + len(buffers)):
            index[f"episode_{k}"] = h5py.ExternalLink(f"parts/{part.name}", f"episode_{k}")
    (writing / "part").replace(part)
    (writing / "index").replace(out / INDEX_FILE_NAME)
    shutil.rmtree(writing)
    steps = sum(len(buffer) for buffer in buffers)
    _update_metadata(
        out,
        total_episodes=episodes + len(buffers),
        total_steps=frames - episodes + steps,
        dataset_size=float(storage.get_size()),
    )


def _compress(source: h5py.File, target: h5py.File, first_episode: int) -> None:
    """Copies Minari's episodes under their final numbers, with frames lightly compressed.

    At 64 x 64 pixels that takes a third of the space of Minari's default chunks, which are padded, and reads as fast.
    """
    for k in range(len(source)):
        episode = target.create_group(f"episode_{first_episode + k}")
        for key, item in source[f"episode_{k}"].items():
            if key == "observations":
                chunk = (min(8, len(item)), *item.shape[1:])
                episode.create_dataset(key, data=item[()], chunks=chunk, compression="gzip", compression_opts=1)
            else:
                source.copy(item, episode, name=key)
        episode.attrs.update(source[f"episode_{k}"].attrs)
        episode.attrs["id"] = first_episode + k


def _progress(out: Path) -> tuple[int, int]:
    """Episodes and frames that the dataset has."""
    metadata = MinariStorage.read_raw_metadata(out)
    return metadata["total_episodes"], metadata["total_steps"] + metadata["total_episodes"]


def _update_metadata(folder: Path, **entries: Any) -> None:
    metadata = {**MinariStorage.read_raw_metadata(folder), **entries}
    beside = folder / f".{METADATA_FILE_NAME}"
    beside.write_text(json.dumps(metadata))
    beside.replace(folder / METADATA_FILE_NAME)


def _fresh_folder(folder: Path) -> Path:
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    return folder
