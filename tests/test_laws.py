"""What makes the flow exact: it inverts, its determinant is autograd's, its density integrates to one, it is causal,
and streaming, batching, clocks and untrained adapters change nothing."""

from functools import partial
from typing import Any

import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CONTROL_WIDTH, KINDS, Kind, normal, of_kind, randomised, tiny_flow, video
from torch import Tensor
from torch.autograd.functional import jacobian

from sfv_world.codec.pixels import PixelCodecConfig
from sfv_world.decoding.frames import StreamState, read_frame, read_video
from sfv_world.flow.model import Encoding, FlowConfig, VideoFlow
from sfv_world.flow.transformer import TransformerConfig
from sfv_world.model import ModelConfig, WorldModel

each_kind = pytest.mark.parametrize("kind", KINDS)
law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
seeds = st.integers(0, 10_000)


def same_frames(a: Encoding, b: Encoding, frames: slice) -> bool:
    """Whether two encodings agree in these frames, bit for bit."""
    pairs = [(a.log_prob, b.log_prob), (a.noise, b.noise), (a.latents, b.latents), (a.features, b.features)]
    return all(torch.equal(x[:, frames], y[:, frames]) for x, y in pairs)


# Inverse -------------------------------------------------------------------------------------------------------------


@each_kind
@given(
    grid=st.sampled_from([(1, 1), (1, 3), (2, 2)]),
    channels=st.integers(1, 3),
    frames=st.integers(1, 5),
    window=st.integers(1, 4),
    blocks=st.integers(1, 3),
    controlled=st.booleans(),
    seed=seeds,
)
@law(max_examples=12)
@torch.no_grad()
def test_inverse_of_forward_is_the_identity(
    kind: Kind, grid: Any, channels: int, frames: int, window: int, blocks: int, controlled: bool, seed: int
) -> None:
    flow = tiny_flow(kind, grid=grid, channels=channels, window=window, blocks=blocks, seed=seed, dtype=torch.float64)
    tokens, controls = video(flow, 2, frames, seed)
    given_controls = controls if controlled else None
    close(flow.inverse(flow(tokens, given_controls).noise, given_controls), tokens, rtol=0, atol=1e-9)
    close(flow(flow.inverse(tokens, given_controls), given_controls).noise, tokens, rtol=0, atol=1e-9)


# Determinant and density ---------------------------------------------------------------------------------------------


@each_kind
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("controlled", [False, True])
def test_log_det_is_that_of_the_jacobian(kind: Kind, blocks: int, controlled: bool) -> None:
    flow = tiny_flow(kind, channels=2, window=2, blocks=blocks, dtype=torch.float64)
    tokens, controls = video(flow, 1, 3)
    given_controls = controls if controlled else None
    matrix = jacobian(lambda x: flow(x, given_controls).noise, tokens).reshape(3, 8, 3, 8)
    encoding = flow(tokens, given_controls)
    close(torch.linalg.slogdet(matrix.reshape(24, 24)).logabsdet, encoding.log_det.sum(), rtol=0, atol=1e-9)
    for n in range(3):  # the Jacobian is triangular in frames, so each frame has its own determinant
        assert not matrix[n, :, n + 1 :].any()
        close(torch.linalg.slogdet(matrix[n, :, n]).logabsdet, encoding.log_det[0, n].sum(), rtol=0, atol=1e-9)


@each_kind
@torch.no_grad()
def test_log_prob_is_the_change_of_variables(kind: Kind) -> None:
    flow = tiny_flow(kind, dtype=torch.float64)
    tokens, controls = video(flow, 2, 4)
    encoding = flow(tokens, controls)
    base = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    close(encoding.log_prob, base.log_prob(encoding.noise).sum(-1) + encoding.log_det, rtol=0, atol=1e-12)
    close(flow.log_prob(tokens, controls), encoding.log_prob.sum(-1), rtol=0, atol=1e-12)


@each_kind
@pytest.mark.parametrize(("grid", "channels", "frames"), [((1, 1), 1, 2), ((1, 2), 1, 1), ((1, 1), 2, 1)])
@torch.no_grad()
def test_density_integrates_to_one(kind: Kind, grid: tuple[int, int], channels: int, frames: int) -> None:
    """Videos of two numbers in all: the density of a frame given the one before, or of a token given another."""
    flow = tiny_flow(kind, grid=grid, channels=channels, depth=1, dtype=torch.float64, scale=0.2, seed=3, curved=False)
    axis = torch.linspace(-20, 20, 321, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis).view(-1, frames, grid[0] * grid[1], channels)
    controls = normal(1, frames, 2, CONTROL_WIDTH, dtype=torch.float64).expand(len(points), -1, -1, -1)
    density = flow.log_prob(points, controls).sum(-1).exp().view(len(axis), len(axis))
    mass = torch.trapezoid(torch.trapezoid(density, axis), axis)
    close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@torch.no_grad()
def test_density_of_a_curve_integrates_to_one() -> None:
    """Of a single number, on a grid that resolves its bins."""
    flow = tiny_flow("bands", grid=(1, 1), channels=1, depth=1, dtype=torch.float64, scale=0.2, seed=3)
    assert flow.config.bins
    axis = torch.linspace(-20, 20, 2561, dtype=torch.float64)
    controls = normal(1, 1, 2, CONTROL_WIDTH, dtype=torch.float64).expand(len(axis), -1, -1, -1)
    mass = torch.trapezoid(flow.log_prob(axis.view(-1, 1, 1, 1), controls).sum(-1).exp(), axis)
    close(mass, torch.ones_like(mass), rtol=0, atol=1e-4)


@each_kind
def test_likelihood_of_a_world_is_over_pixels(kind: Kind) -> None:
    codec = PixelCodecConfig(2, 4, patch=2)
    sizes = TransformerConfig(16, 1, head_dim=16, window=2), TransformerConfig(16, 1, head_dim=16)
    flow = of_kind(FlowConfig(codec.channels, codec.grid, *sizes, shallow_blocks=2, control_width=4), kind)
    model = randomised(WorldModel(ModelConfig(codec, flow), spaces.Discrete(3))).double()
    model.codec.scale.copy_(torch.linspace(0.3, 2, codec.channels))
    actions, known = torch.eye(3, dtype=torch.float64)[None, :2], torch.tensor([[False, True]])

    def noise(pixels: Tensor) -> Tensor:
        return model(model.codec.encode(pixels), actions, known).encoding.noise

    pixels = normal(1, 2, 2, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        reading = model(model.codec.encode(pixels), actions, known)
    size = pixels.numel()
    log_det = torch.linalg.slogdet(jacobian(noise, pixels).reshape(size, size)).logabsdet
    base = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    expected = base.log_prob(noise(pixels)).sum() + log_det
    close(reading.log_likelihood.sum(), expected, rtol=0, atol=1e-6)  # the cosine transform is rounded to float32


# Causality -----------------------------------------------------------------------------------------------------------


@each_kind
@given(frame=st.integers(0, 4), token=st.integers(0, 3), window=st.integers(1, 3), seed=seeds)
@law(max_examples=10)
@torch.no_grad()
def test_a_token_changes_nothing_before_its_frame(kind: Kind, frame: int, token: int, window: int, seed: int) -> None:
    flow = tiny_flow(kind, window=window, seed=seed)
    tokens, controls = video(flow, 2, 5, seed)
    changed = tokens.clone()
    changed[0, frame, token] += 1
    before, after = flow(tokens, controls), flow(changed, controls)
    assert same_frames(before, after, slice(0, frame))
    for n in range(frame, min(frame + 2, 5)):
        assert not torch.equal(before.noise[0, n], after.noise[0, n])
    exact(after.noise[1], before.noise[1])


@each_kind
@given(frame=st.integers(0, 4), seed=seeds)
@law(max_examples=8)
@torch.no_grad()
def test_an_action_changes_nothing_before_the_frame_it_leads_to(kind: Kind, frame: int, seed: int) -> None:
    flow = tiny_flow(kind, seed=seed)
    tokens, controls = video(flow, 1, 5, seed)
    changed = controls.clone()
    changed[:, frame] += 1
    before, after = flow(tokens, controls), flow(tokens, changed)
    assert same_frames(before, after, slice(0, frame))
    for n in range(frame, min(frame + 2, 5)):
        assert not torch.equal(before.log_prob[:, n], after.log_prob[:, n])


@each_kind
@given(depth=st.integers(1, 2), window=st.integers(1, 3), seed=seeds)
@law(max_examples=8)
@torch.no_grad()
def test_the_window_is_exact(kind: Kind, depth: int, window: int, seed: int) -> None:
    """A slot carries what came before it, so W frames of slots reach W frames back, and each further layer W - 1."""
    reach = depth * (window - 1) + 1
    flow = tiny_flow(kind, window=window, depth=depth, seed=seed)
    tokens, controls = video(flow, 1, reach + 3, seed)
    beyond, within = tokens.clone(), tokens.clone()
    beyond[:, :2] += 1
    within[:, 2] += 1
    before = flow(tokens, controls)
    assert same_frames(before, flow(beyond, controls), slice(reach + 2, None))
    assert not torch.equal(before.noise[:, -1], flow(within, controls).noise[:, -1])


# Streaming, clocks, rows, adapters -----------------------------------------------------------------------------------


def stream(
    flow: VideoFlow, tokens: Tensor, controls: Tensor | None, known: int, clock: int | None = None
) -> StreamState:
    """Reads `known` frames at once and the others one by one, each held against the parallel pass."""
    encoding = flow(tokens, controls)
    head = None if controls is None else controls[:, :known]
    state, first = read_video(flow, tokens[:, :known], head, clock)
    close(first.log_prob, encoding.log_prob[:, known - 1])
    close(first.noise, encoding.noise[:, known - 1])
    for n in range(known, tokens.shape[1]):
        report = read_frame(flow, state, tokens[:, n], None if controls is None else controls[:, n])
        close(report.log_prob, encoding.log_prob[:, n])
        close(report.noise, encoding.noise[:, n])
        close(report.features, encoding.features[:, n])
        exact(state.tokens, tokens[:, n])
        assert not report.certificate.any() and (report.sweeps == 1).all()
    return state


@each_kind
@given(known=st.integers(1, 7), window=st.integers(1, 4), controlled=st.booleans(), seed=seeds)
@law(max_examples=10)
@torch.no_grad()
def test_streaming_equals_the_parallel_pass(kind: Kind, known: int, window: int, controlled: bool, seed: int) -> None:
    flow = tiny_flow(kind, window=window, seed=seed)
    tokens, controls = video(flow, 2, 8, seed)
    given_controls = controls if controlled else None
    state = stream(flow, tokens, given_controls, known)
    whole, _ = read_video(flow, tokens, given_controls)
    assert state.cache.clock == whole.cache.clock == 8
    exact(state.cache.visible, whole.cache.visible)
    close(state.cache.keys, whole.cache.keys)
    close(state.cache.values, whole.cache.values)
    for ours, theirs in zip(state.stages, whole.stages, strict=True):
        close(ours.tokens, theirs.tokens)
        close(ours.fields.mu, theirs.fields.mu)
        close(ours.fields.sigma, theirs.fields.sigma)


@each_kind
@pytest.mark.parametrize("clock", [7, 1000, 10**7, 10**9])
@torch.no_grad()
def test_the_clock_does_not_matter(kind: Kind, clock: int) -> None:
    flow = tiny_flow(kind)
    state = stream(flow, *video(flow, 2, 9), known=4, clock=clock)
    assert state.cache.clock == clock + 5


@each_kind
@given(clock=st.integers(0, 10_000), window=st.integers(1, 3), known=st.integers(1, 4), seed=seeds)
@law(max_examples=6)
@torch.no_grad()
def test_a_row_can_join_others_at_their_clock(kind: Kind, clock: int, window: int, known: int, seed: int) -> None:
    flow = tiny_flow(kind, window=window, seed=seed)
    tokens, controls = video(flow, 2, 6, seed)
    expected = flow(tokens, controls).log_prob
    state, _ = read_video(flow, tokens[:, :3], controls[:, :3], 3 + clock)
    other, _ = read_video(flow, tokens[1:, :known], controls[1:, :known])
    untouched = state.rows(torch.tensor([0, 1]))
    other.cache = flow.deep.at_clock(other.cache, state.cache.clock)
    state.put(torch.tensor([1]), other)
    for n, m in ((3, known), (4, known + 1)):
        next_tokens = torch.stack([tokens[0, n], tokens[1, m]])
        report = read_frame(flow, state, next_tokens, torch.stack([controls[0, n], controls[1, m]]))
        close(report.log_prob, torch.stack([expected[0, n], expected[1, m]]))
        alone = read_frame(flow, untouched, tokens[:, n], controls[:, n])
        exact(report.log_prob[0], alone.log_prob[0])


@each_kind
@given(frames=st.integers(1, 5), row=st.integers(0, 3), seed=seeds)
@law(max_examples=6)
@torch.no_grad()
def test_a_row_of_many_is_that_row_alone(kind: Kind, frames: int, row: int, seed: int) -> None:
    flow = tiny_flow(kind, seed=seed)
    tokens, controls = video(flow, 4, frames, seed)
    many, alone = flow(tokens, controls), flow(tokens[row : row + 1], controls[row : row + 1])
    close(alone.noise[0], many.noise[row], rtol=1e-5, atol=1e-5)
    close(alone.log_prob[0], many.log_prob[row], rtol=1e-5, atol=1e-5)


@each_kind
@torch.no_grad()
def test_copied_rows_go_their_own_way(kind: Kind) -> None:
    """Rows selected, repeated and reordered continue as their originals would, which know nothing of it."""
    flow = tiny_flow(kind)
    tokens, controls = video(flow, 3, 6)
    encoding = flow(tokens, controls)
    state, _ = read_video(flow, tokens[:, :4], controls[:, :4])
    rows = torch.tensor([2, 0, 2])
    fork = state.rows(rows)
    read_frame(flow, fork, normal(3, 4, 3, seed=9), None)
    fork = state.rows(rows)
    for n in (4, 5):
        close(read_frame(flow, fork, tokens[rows, n], controls[rows, n]).log_prob, encoding.log_prob[rows, n])
    for n in (4, 5):
        close(read_frame(flow, state, tokens[:, n], controls[:, n]).log_prob, encoding.log_prob[:, n])


@each_kind
@torch.no_grad()
def test_a_closed_adapter_changes_nothing(kind: Kind) -> None:
    flow = tiny_flow(kind)
    tokens, controls = video(flow, 2, 4)
    assert not torch.equal(flow(tokens, controls).log_prob, flow(tokens).log_prob)
    for name, parameter in flow.named_parameters():
        if name.endswith("controls.gate"):
            parameter.zero_()
    assert same_frames(flow(tokens, controls), flow(tokens), slice(None))


@each_kind
def test_a_new_flow_is_the_identity(kind: Kind) -> None:
    flow = VideoFlow(tiny_flow(kind).config)
    tokens, controls = video(flow, 2, 3)
    encoding = flow(tokens, controls)
    close(encoding.noise, tokens, rtol=0, atol=1e-6)
    close(encoding.log_det, torch.zeros(2, 3, 4), rtol=0, atol=1e-6)
