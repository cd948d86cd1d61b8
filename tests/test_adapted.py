"""Worlds on a released model: the adapter's law, streams equal parallel passes, and the contracts of environments."""

import json
import pickle
import shutil
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from adapted import HEIGHT, WIDTH, make_backbone, make_model, make_world
from gymnasium.utils.env_checker import check_env
from released import count_caches
from safetensors.torch import load_file, save_file
from test_text import LENGTH
from tiny import normal

import sfv_world
from sfv_world import World, memory
from sfv_world.codec.vae import to_frames, to_pixels
from sfv_world.decoding.solver import DecodingConfig
from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.flow.affine import guide
from sfv_world.released import backbone, load
from sfv_world.released import convert as converting
from sfv_world.released.adapted import AdaptedConfig, load_adapted
from sfv_world.released.convert import ConvertConfig, convert
from sfv_world.released.plan import sampling_needs
from sfv_world.released.sampling import clean


@pytest.fixture(scope="module", params=[4, 1], ids=["time-4", "time-1"])
def folder(request, tmp_path_factory):
    """Folder of a world whose step has so many frames; tests must not change it."""
    home = tmp_path_factory.mktemp("adapted")
    released = make_backbone(home, request.param, denoiser=request.param == 4)
    return make_world(home / "world", make_model(released), released)


@pytest.fixture(scope="module")
def world(folder):
    return sfv_world.load_world(folder)


def video(world, rows, steps, seed=0):
    """Frames of whole steps, the first one a frame alone, and the actions between them."""
    rng, count = np.random.default_rng(seed), 1 + (steps - 1) * world.time
    return rng.integers(0, 256, (rows, count, HEIGHT, WIDTH, 3), np.uint8), rng.integers(0, 3, (rows, count - 1))


def close(actual, expected, atol=1e-3):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# The adapter ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_changes_nothing_bit_for_bit(tmp_path, dtype):
    model = make_model(make_backbone(tmp_path), scale=0)
    flow = model.flow
    for block in flow.blocks:
        block.attn_blocks.to(dtype)
    tokens, grid = normal(2, 3, 6, 4), model.codec.config.grid
    text = model.text.expand(2, -1, -1)
    plain = flow(tokens, text, grid)
    actions, known = normal(2, 3, 12, seed=1), torch.ones(2, 3, dtype=torch.bool)
    adapted = model(tokens, actions, known).encoding
    for mine, theirs in zip((*adapted[:4], *adapted.fields), (*plain[:4], *plain.fields), strict=True):
        assert torch.equal(mine, theirs)
    # One that is trained changes the latents' density, and nothing of what comes before the deep block or the action.
    with torch.no_grad():
        model.adapter.layers[0].gate += 1.0
    moved = model(tokens, actions, known).encoding
    assert torch.equal(moved.latents, plain.latents) and not torch.equal(moved.fields.mu, plain.fields.mu)
    other = model(tokens, torch.cat([actions[:, :2], -actions[:, 2:]], dim=1), known).encoding
    assert torch.equal(other.noise[:, :2], moved.noise[:, :2]) and not torch.equal(other.noise[:, 2], moved.noise[:, 2])


def test_the_backbone_is_no_part_of_the_models_weights(world):
    names = {name.split(".")[0] for name in world.model.state_dict()}
    assert names == {"text", "unconditional", "controls", "adapter", "heads"}
    assert not any(p.requires_grad for p in (*world.model.flow.parameters(), *world.model.codec.parameters()))


def test_tokens_are_those_that_the_released_model_makes_of_latents(world):
    frames = torch.from_numpy(video(world, 2, 3)[0])
    codec, flow = world.model.codec, world.model.flow
    latents = codec.vae.encode(to_pixels(frames))
    signal = codec.signal(frames)
    assert torch.equal(codec.encode(signal), flow.tokens(latents)) and codec.log_det == 0
    assert torch.equal(codec.decode(codec.encode(signal)), signal)
    assert torch.equal(codec.frames(signal), to_frames(codec.vae.decode(latents)))


# Streams -------------------------------------------------------------------------------------------------------------


def test_chunks_begin_with_the_last_frames_of_the_one_before():
    config = AdaptedConfig.chunks
    given = type("Given", (), {"chunk": 4, "context": 2})()
    found = [(at.start, at.stop, before) for at, before in config(given, 9)]
    assert found == [(0, 4, 0), (2, 6, 2), (4, 8, 2), (6, 9, 2)]


def test_observing_step_by_step_is_scoring_in_parallel(world):
    steps = 8  # two restarts
    frames, actions = video(world, 2, steps)
    score = world.score(frames, actions, seeds=[3, 5])
    assert score.log_likelihood.shape == (2, steps)
    state = world.reset(frames[:, :1], seeds=[3, 5])
    for step in range(1, steps):
        first = 1 + (step - 1) * world.time
        shown = frames[:, first : first + world.time] if world.time > 1 else frames[:, first]
        acted = actions[:, first - 1 : first - 1 + world.time]
        state, output = world.observe(state, acted, shown, held=False)
        close(output.log_likelihood, score.log_likelihood[:, step], atol=2e-3)
        close(output.termination_probability, score.termination_probability[:, step], atol=1e-5)
        torch.testing.assert_close(output.rewards, score.rewards[:, step], rtol=1e-4, atol=1e-3)
        assert np.array_equal(output.frames, shown) and output.bits_per_dim.shape == (2,)


def test_an_outcome_is_told_before_its_frames_are_seen(world):
    frames, actions = video(world, 2, 3)
    other = frames.copy()
    other[:, -world.time :] = 255 - other[:, -world.time :]
    found, expected = (world.score(each, actions) for each in (other, frames))
    assert not torch.allclose(found.log_likelihood[:, -1], expected.log_likelihood[:, -1])
    close(found.termination_probability, expected.termination_probability, atol=1e-5)
    close(found.rewards, expected.rewards, atol=1e-4)


@pytest.mark.parametrize("denoise", ["none", "causal"])
def test_what_is_said_of_imagined_steps_is_that_of_a_parallel_pass(world, denoise):
    world = World(world.model, DecodingConfig(block=4, denoise=denoise), world.starts)
    state = world.start([0, 1, 2])
    begun = state[:].stream
    outputs, tokens, controls = [], [], []
    for actions in ([0, 1, 2], [2, 2, 0], [1, 0, 0], [0, 0, 1], [2, 1, 0]):
        state, output = world.step(state, actions)
        outputs.append(output)
        tokens.append(state.stream.tokens)
        controls.append(state.stream.parts[0].chunk[-1].controls)
        assert output.frames.shape == (3, *world.observation_shape) and output.certificate.max() < 1e-3
    model = world.model
    start = [[begun.parts[0].chunk[n][part] for n in range(3)] for part in (0, 2)]
    whole, told = torch.stack(start[0] + tokens, dim=1), torch.stack(start[1] + controls, dim=1)
    with torch.no_grad():
        for at, before in model.config.chunks(8):
            encoding = model.flow(
                whole[:, at],
                model.text.expand(3, -1, -1),
                model.codec.config.grid,
                model.adapter.told(told[:, at], LENGTH),
            )
            for n in range(max(before, 3 - at.start), at.stop - at.start):
                output = outputs[at.start + n - 3]
                close(output.log_likelihood, encoding.log_prob[:, n].sum(-1), atol=5e-3)
                close(output.noise, encoding.noise[:, n])


@pytest.mark.parametrize("block", [1, None])
def test_guidance_is_that_of_two_parallel_passes(world, block):
    """Away from neither prompt nor actions, in every chunk; what is said is said without guidance."""
    guided, model = world.with_decoding(guidance=1.5, block=block), world.model
    state, said, noises = guided.start([0, 1]), [], [normal(2, *world._token_shape, seed=seed) for seed in range(3)]
    first = state.stream.parts[0].chunk[:]
    for noise, actions in zip(noises, ([0, 1], [2, 2], [1, 0]), strict=True):
        state, output = guided.step(state, actions, noise)
        said.append(output)
        first.append(state.stream.parts[0].chunk[-1])
        assert output.guided.all() and output.certificate.max() < 1e-3
        assert block is None or (output.sweeps == 2 * 6).all()  # of six tokens, with prompt and actions and without
    tokens, _, controls = (torch.stack(part, dim=1) for part in zip(*first, strict=True))
    with torch.no_grad():
        for at, before in model.config.chunks(6):
            here, grid = tokens[:, at], model.codec.config.grid
            told = controls[:, at], model.controls.absent.expand_as(controls[:, at])
            texts = (text.expand(2, -1, -1) for text in (model.text, model.unconditional))
            with_all, without = (
                model.flow(here, text, grid, model.adapter.told(of, LENGTH))
                for text, of in zip(texts, told, strict=True)
            )
            found = guide(with_all.fields, without.fields, 1.5).normalise(with_all.latents)[0]
            for n in range(max(before, 3 - at.start), at.stop - at.start):
                step = at.start + n - 3
                close(found[:, n], noises[step], atol=2e-3)
                close(said[step].noise, with_all.noise[:, n])
                close(said[step].log_likelihood, with_all.log_prob[:, n].sum(-1), atol=5e-3)
    assert (said[0].noise - noises[0]).abs().max() > 0.01


def test_guidance_may_begin_and_end_and_rows_with_and_without_it_are_one_state(world):
    """Whenever it is asked for, it is what it would have been, had the stream known from its beginning."""
    guided = world.with_decoding(guidance=1.5)
    actions = np.array([0, 1])
    state, _ = world.step(world.start([0, 1]), actions)
    one, unguided = world.step(state[:], actions)
    begun, output = guided.step(state[:], actions)
    assert (output.frames != unguided.frames).any() and begun.stream.parts[0].deep.block.copies == 2
    back, same = world.step(begun[:], actions)  # no longer guided, at the same frame
    assert not same.guided.any() and len(back.stream.parts) == 1
    one.put(np.array([1]), begun[[0]])
    both, mixed = guided.step(one, actions[[1, 0]])
    _, alone = guided.step(begun, actions)
    close(mixed.log_likelihood[1], alone.log_likelihood[0], atol=2e-3)
    assert len(both.stream.parts) == 2 and len(both[[]]) == 0
    frames, _ = video(world, 2, 2, seed=3)
    shown = frames[:, 1:] if world.time > 1 else frames[:, 1]
    start = world.reset(frames[:, :1])
    after, _ = world.observe(start[:], actions, shown)
    assert after.stream.parts[0].deep.block.copies == 1
    after, _ = guided.step(after, actions)
    again, _ = guided.step(world.observe(start, actions, shown)[0], actions)
    assert torch.equal(after.stream.tokens, again.stream.tokens)


@pytest.mark.parametrize("denoise", ["none", "causal"])
def test_a_real_video_is_made_of_its_noise_again(world, denoise):
    """Abducted noise decodes the same frames under the same actions, through restarts; under others, others."""
    world = world.with_decoding(denoise=denoise, block=4)
    frames, actions = video(world, 2, 8)
    context = 1 + world.time
    found = world.abduct(frames, actions, [5, 6], context)
    score = world.score(frames, actions, [5, 6])
    close(found.log_likelihood, score.log_likelihood[:, 2:], atol=2e-3)
    assert found.frames.shape == frames[:, context:].shape and found.noise.shape[:2] == (2, 6)
    state, other = found.state[:], found.state[:]
    for n, shown in enumerate(found.frames.split(world.time, dim=1)):
        first = context + n * world.time
        acted = actions[:, first - 1 : first - 1 + world.time]
        state, output = world.step(state, acted, found.noise[:, n], held=False)
        other, changed = world.step(other, 2 - acted, found.noise[:, n], held=False)
        close(output.frames.reshape(shown.shape).float(), shown.float(), atol=2.0)
        close(output.log_likelihood, found.log_likelihood[:, n], atol=2e-2)
    assert (changed.frames != output.frames).float().mean() > 0.1
    assert (found.frames.numpy() != frames[:, context:]).mean() > 0.5  # noised as they are seen
    if world.time == 4:
        with pytest.raises(ValueError, match=r"frames: expected 1 \+ a multiple of the 4 frames of a step, got 3"):
            world.abduct(frames, actions, context=3)


def test_what_cleans_is_told_of_the_actions(world, monkeypatch):
    """The score of a model without a denoiser is that of the adapted model; a denoiser was never told of actions."""
    model, shown = world.model, []
    decode = model.codec.decode
    monkeypatch.setattr(model.codec, "decode", lambda tokens: shown.append(tokens) or decode(tokens))
    state, _ = world.with_decoding(denoise="causal").step(world.start([0, 1]), [2, 1])
    tokens, _, controls = (torch.stack(part, dim=1) for part in zip(*state.stream.parts[0].chunk, strict=True))
    told, about = model.adapter.told(controls, LENGTH), (model.text.expand(2, -1, -1), model.codec.config.grid, 0.5)
    close(shown[-1], clean(model.flow, tokens, *about, told)[:, -1:], atol=1e-5)
    untold = clean(model.flow, tokens, *about)[:, -1:]
    assert torch.allclose(shown[-1], untold, atol=1e-5) == (model.flow.learnable_self_denoiser is not None)


def test_a_restart_lets_go_of_the_keys_and_values_before(world, monkeypatch):
    counts = count_caches(monkeypatch, world.model.flow.block(-1))
    state = world.start([0])
    for _ in range(5):  # three frames of a chunk of four are there: two restarts
        state, _ = world.step(state, [1])
    assert counts == [1, 1, 1]


def test_rows_are_alone_and_copies_go_on_alike(world):
    state = world.start([4, 5])
    copy, alone = state[[1, 0, 1]], world.start([5])
    for actions in ([0, 1], [2, 1], [0, 0], [1, 1]):
        state, both = world.step(state, actions)
        copy, three = world.step(copy, [actions[1], actions[0], actions[1]])
        alone, one = world.step(alone, actions[1:])
        for mine, theirs, own in zip(both, three, one, strict=True):  # to the rounding of the control encoder
            close(mine[[1, 0, 1]].float(), theirs.float(), atol=1.0 if mine is both.frames else 1e-3)
            close(mine[1:].float(), own.float(), atol=1.0 if mine is both.frames else 1e-3)
    assert not torch.equal(both.frames[0], both.frames[1])


def test_rows_at_the_same_place_are_computed_together(world):
    """Whichever rows begin anew, or in the place of which others, and when: each goes on as it would alone."""
    state, alone = world.start([3, 4, 5, 6]), [world.start([seed]) for seed in (3, 4, 5, 6)]

    def goes_on(parts):
        nonlocal state
        assert len(state.stream.parts) == parts
        state, output = world.step(state, [1, 2, 1, 0])
        for row, action in enumerate((1, 2, 1, 0)):
            alone[row], one = world.step(alone[row], [action])
            close(output.log_likelihood[row], one.log_likelihood[0], atol=2e-3)
            close(output.noise[row], one.noise[0])
            close(output.frames[row].float(), one.frames[0].float(), atol=1.0)

    goes_on(parts=1)
    for rows, seeds, parts in (((2, 0), (7, 8), 2), ((1,), (9,), 3), ((3, 1, 2), (10, 11, 12), 2)):
        state.put(np.array(rows), world.start(list(seeds)))
        for row, seed in zip(rows, seeds, strict=True):
            alone[row] = world.start([seed])
        goes_on(parts)
    state.put(np.array([0]), state[[3]])
    alone[0] = alone[3][:]
    goes_on(parts=1)
    state, alone = state[[2, 2, 0, 1]], [alone[2][:], alone[2], alone[0], alone[1]]
    goes_on(parts=1)
    assert len(state[[]]) == len(state[[]].stream.tokens) == 0


def test_rows_that_come_to_the_same_place_go_on_together(world):
    """What was observed and what was imagined are kept apart until a chunk restarts."""
    frames, actions = video(world, 1, 3)
    state, _ = world.step(world.start([3, 4]), [1, 2])
    observed = world.reset(frames, actions)
    shown = video(world, 1, 2, seed=1)[0][:, 1:]
    observed, _ = world.observe(observed, [1], shown if world.time > 1 else shown[:, 0])
    alone = observed[:]
    state.put(np.array([1]), observed)
    assert len(state.stream.parts) == 2
    with pytest.raises(ValueError, match="state: expected one that was not used up"):
        world.step(observed, [0])
    for _ in range(3):
        state, both = world.step(state, [0, 2])
        alone, one = world.step(alone, [2])
        close(both.log_likelihood[1:], one.log_likelihood, atol=2e-3)
    assert len(state.stream.parts) == 1


def test_a_step_that_fails_midway_uses_its_state_up(world, monkeypatch):
    frames, _ = video(world, 2, 2)
    shown = frames[:, 1:] if world.time > 1 else frames[:, 1]
    for verb in (lambda of: world.observe(of, [0, 1], shown), lambda of: world.step(of, [0, 1])):
        state = world.reset(frames[:, :1])
        with monkeypatch.context() as patched, pytest.raises(MemoryError):
            patched.setattr(world.model.flow, "orient", lambda *arguments: (_ for _ in ()).throw(MemoryError()))
            verb(state)
        with pytest.raises(ValueError, match="state: expected one that was not used up"):
            verb(state)


def test_rows_that_began_at_different_steps_are_restored_bit_for_bit(world):
    envs = WorldVectorEnv(4, world=world, autoreset_mode="Disabled")
    envs.reset(seed=0)
    actions = np.array([0, 1, 2, 1])
    envs.step(actions)
    envs._ended[:] = False
    envs.reset(options={"reset_mask": np.array([True, False, False, True])})
    saved, runs = envs.save_state(), []
    for _ in range(2):
        runs.append([])
        for _ in range(3):
            frames, *_, info = envs.step(actions)
            envs._ended[:] = False
            runs[-1] += [frames, info["log_likelihood"]]
        envs.restore_state(saved)
    for first, again in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, again)


def test_actions_change_what_follows(world):
    state = world.start([0])
    _, one = world.step(state[:], [0])
    _, same = world.step(state[:], [[0] * world.time], held=False)
    assert torch.equal(one.frames, same.frames)
    _, other = world.step(state[:], [1])
    _, unknown = world.step(state, None)
    assert not torch.equal(one.frames, other.frames) and not torch.equal(one.frames, unknown.frames)


def test_the_first_frame_alone_is_shown_as_a_still(world):
    frames, _ = video(world, 2, 1)
    state = world.reset(frames)
    assert state.frames.shape == (2, *world.observation_shape)
    assert (state.frames.numpy().reshape(2, -1, HEIGHT, WIDTH, 3) == frames).all()
    frames, actions = video(world, 2, 3)
    shown = world.reset(frames, actions).frames.numpy().reshape(2, -1, HEIGHT, WIDTH, 3)
    assert np.array_equal(shown, frames[:, -world.time :])


# Environments --------------------------------------------------------------------------------------------------------


def test_gymnasium_accepts_it(folder, world):
    env = gym.make("sfv_world/World-v0", world=str(folder), render_mode="rgb_array", max_episode_steps=3)
    shape = (4, HEIGHT, WIDTH, 3) if world.time == 4 else (HEIGHT, WIDTH, 3)
    assert env.observation_space == gym.spaces.Box(0, 255, shape, np.uint8) and env.action_space == gym.spaces.Discrete(
        3
    )
    assert env.metadata["render_fps"] == 8.0 / world.time
    check_env(env.unwrapped, skip_render_check=True)
    frames, actions = video(world, 1, 2)
    first, _ = env.reset(seed=0, options={"frames": frames[0], "actions": actions[0]})
    assert np.array_equal(first.reshape(-1, HEIGHT, WIDTH, 3), frames[0, -world.time :])
    shown, reward, _, _, info = env.step(1)
    assert env.observation_space.contains(shown) and np.isfinite([reward, info["log_likelihood"]]).all()
    assert np.array_equal(env.render(), shown.reshape(-1, HEIGHT, WIDTH, 3)[-1]) and info["certificate"] < 1e-3
    saved = env.unwrapped.save_state()
    again = [env.step(2)[0]]
    env.unwrapped.restore_state(saved)
    again.append(env.unwrapped.step(2)[0])
    assert np.array_equal(*again)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_rows_are_single_environments(folder, world, mode):
    """Each row, wherever it begins anew, is what an environment with its seed is."""
    envs = WorldVectorEnv(2, world=world, max_episode_steps=2, autoreset_mode=mode)
    single = [gym.make("sfv_world/World-v0", world=world, max_episode_steps=2) for _ in range(2)]
    found, _ = envs.reset(seed=7)
    assert envs.observation_space.shape == (2, *world.observation_shape)
    ended = [False, False]
    for row, env in enumerate(single):
        assert np.array_equal(env.reset(seed=7 + row)[0], found[row])
    for actions in np.random.default_rng(0).integers(0, 3, (7, 2)):
        found, rewards, *_ = envs.step(actions)
        for row, env in enumerate(single):
            if mode == "NextStep" and ended[row]:
                ended[row], frames = False, env.reset()[0]
            else:
                frames, reward, terminated, truncated, _ = env.step(actions[row])
                ended[row] = terminated or truncated
                assert reward == pytest.approx(rewards[row], abs=1e-3)
                if mode == "SameStep" and ended[row]:
                    frames = env.reset()[0]
            assert np.abs(frames.astype(int) - found[row]).max() <= 1  # the control encoder rounds otherwise


# Files and mistakes --------------------------------------------------------------------------------------------------


def test_a_folder_holds_the_adapter_alone_and_reads_the_same(folder, world):
    size = (folder / "model.safetensors").stat().st_size
    assert size < 5 * sum(p.numel() for p in world.model.parameters()) + 10_000
    again = sfv_world.load_world(folder)
    again.model.config = replace(again.model.config, backbone="elsewhere")  # wherever the same backbone lies
    assert again.checksum == world.checksum and again.decoding.denoise == "causal"


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_saved_state_goes_on_bit_for_bit(world, tmp_path, steps, guidance):
    """Observed or imagined, at a chunk's beginning or its end; pickled or deeply copied, it takes no weight along."""
    world = world.with_decoding(guidance=guidance)
    state = world.start([4, 5])[[1, 0, 1]]
    for step in range(steps):
        state, _ = world.step(state, [step % 3, 1, 0])
    world.save_state(state, tmp_path / "state")
    pickled = pickle.dumps(state[:])
    chunk = state[:].stream.parts[0].chunk
    assert len(pickle.dumps(chunk)) < 1.5 * sum(x.nbytes for past in chunk for x in past) + 1000 * len(chunk)
    assert b"Parameter" not in pickled and b"nn.modules" not in pickled
    for copy in (world.load_state(tmp_path / "state"), pickle.loads(pickled), deepcopy(state[:])):
        mine = state[:]
        if steps == 0:
            frames = video(world, 3, 2)[0][:, 1:]
            told = {"actions": [0, 1, 2], "frames": frames if world.time > 1 else frames[:, 0]}
            (mine, said), (copy, again) = world.observe(mine, **told), world.observe(copy, **told)
            for one, other in zip(said, again, strict=True):
                assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
        for step in range(4):
            (mine, said), (copy, again) = (world.step(of, [step % 3, 2, 1]) for of in (mine, copy))
            for one, other in zip(said, again, strict=True):
                assert torch.equal(one, other)


def test_a_state_is_of_what_the_backbone_computes_in(tmp_path):
    world = World(make_model(make_backbone(tmp_path)))
    before, world = world.checksum, World(world.model)
    for block in world.model.flow.blocks:
        block.attn_blocks.to(torch.bfloat16)
    assert world.checksum != before


def test_the_backbone_computes_in_what_is_asked_for(folder, world):
    half = sfv_world.load_world(folder, dtype=torch.bfloat16)
    assert half.model.flow.block(-1).layer_weight.dtype == torch.bfloat16
    assert (
        half.checksum != world.checksum
        and half.start([0]).stream.parts[0].deep.block.cache.keys[0].dtype == torch.bfloat16
    )
    env = gym.make("sfv_world/World-v0", world=str(folder), dtype=torch.bfloat16)
    assert env.unwrapped.world.checksum == half.checksum
    frames, actions = video(world, 1, 3)
    close(half.score(frames, actions).bits_per_dim, world.score(frames, actions).bits_per_dim, atol=0.05)


def test_mistakes_are_told(folder, world):
    frames, _ = video(world, 1, 3)
    state, _ = world.step(world.start([0]), [0])
    observed = frames[:, : world.time] if world.time > 1 else frames[:, 0]
    with pytest.raises(ValueError, match=r"state: expected rows all of whose frames were observed.*in rows \[0\]"):
        world.observe(state, [0], observed)
    world.step(state, [0])  # it was not used up
    for wrong in ({"denoise": "lookahead"}, {"draft": "learned"}):
        with pytest.raises(ValueError, match=r"expected .* for world, a world on a released model"):
            gym.make("sfv_world/World-v0", world=str(folder), **wrong).reset(seed=0)
    if world.time == 4:
        with pytest.raises(ValueError, match=r"frames: expected 1 \+ a multiple of the 4 frames of a step, got 4"):
            world.reset(frames[:, :4])


def test_memory_of_a_whole_chunk_is_counted_before_loading(folder, monkeypatch):
    needs = sampling_needs(*backbone.find_parts(folder.parent / "backbone"), HEIGHT, WIDTH, 4, "float32")
    monkeypatch.setattr(memory, "available", lambda device: sum(need.size for need in needs) - 1)
    monkeypatch.setattr(backbone, "load_released", lambda *arguments, **options: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"memory: expected .*keys and values, deep block .*Give a larger device"):
        sfv_world.load_world(folder)


def test_rows_that_do_not_fit_are_told_before_they_are_begun(world, monkeypatch):
    state = world.start([0, 1])
    cache = state.stream.parts[0].deep.block.cache
    assert state.size > 2 * cache.nbytes / 2
    frames = 1 + 2 * world.time
    assert world.model.row_size(frames, world.decoding) > cache.nbytes / 2  # of two rows: the keys and values of one
    guided = world.with_decoding(guidance=1.0).decoding
    more = world.model.row_size(frames, guided) - world.model.row_size(frames, world.decoding)
    assert more == pytest.approx(cache.nbytes / 2)
    monkeypatch.setattr(memory, "UNASKED", 0)
    monkeypatch.setattr(memory, "available", lambda device: state.size)
    assert len(state[:]) == 2
    for act in (lambda: state[[0, 1, 0]], lambda: world.start(np.arange(1000))):
        with pytest.raises(
            ValueError, match=r"memory: expected about .* free on cpu \((3|1000) rows .*Give fewer rows"
        ):
            act()
    world.step(state, [0, 0])  # it was not used up


def test_a_world_without_its_backbone_is_told(tmp_path):
    released = make_backbone(tmp_path)
    folder = make_world(tmp_path / "world", make_model(released), released)
    with pytest.raises(ValueError, match=r"expected a world, got a released model.*--freeze-backbone"):
        sfv_world.load_world(released)
    released.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"backbone: expected the released model .*found no such folder.*config.json"):
        load_adapted(folder)
    (tmp_path / "second").mkdir()
    make_backbone(tmp_path / "second", denoiser=False).rename(released)
    with pytest.raises(ValueError, match=r"backbone: expected the released model and VAE that .* was trained on"):
        load_adapted(folder)


def test_another_vae_is_told(tmp_path):
    released = make_backbone(tmp_path)
    folder = make_world(tmp_path / "world", make_model(released), released)
    path = released / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path)
    load_adapted(folder)  # written anew, it is the same
    told = r"backbone: expected the released model and VAE that .* was trained on"
    save_file(tensors | {"decoder.conv_in.bias": tensors["decoder.conv_in.bias"] + 0.01}, path)
    with pytest.raises(ValueError, match=told):
        load_adapted(folder)
    save_file(tensors, path)
    config = json.loads((released / "vae/config.json").read_text())
    (released / "vae/config.json").write_text(json.dumps({**config, "latents_mean": [0.5] * 4}))
    with pytest.raises(ValueError, match=told):
        load_adapted(folder)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model.safetensors: expected safetensors, got a file"):
        load_adapted(folder)


def test_a_backbone_whose_large_matrices_changed_is_told(tmp_path, monkeypatch):
    """As where a LoRA was merged into it; however the same tensors are packed, it is the same."""
    monkeypatch.setattr(load, "SMALL", 100)
    released = make_backbone(tmp_path)
    folder = make_world(tmp_path / "world", make_model(released), released)
    source, about = tmp_path / "tiny.pth", str(tmp_path / "tiny.json")
    state = torch.load(source)
    for name, same in ((None, True), ("blocks.2.attn_blocks.1.attention.qkv.weight", False)):
        torch.save({key: x + 0.01 * (key == name) for key, x in state.items()}, source)
        (released / "vae").rename(tmp_path / "vae")
        shutil.rmtree(released)
        with monkeypatch.context() as patched:
            patched.setattr(converting, "split", lambda sizes, limit: [[key] for key in sizes])
            convert(ConvertConfig(source, released, about))
        (tmp_path / "vae").rename(released / "vae")
        with nullcontext() if same else pytest.raises(ValueError, match="expected the released model and VAE that "):
            load_adapted(folder)
