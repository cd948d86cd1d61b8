"""Decoding: whatever the draft, the blocks and the limit, a frame is what it is reported to be, row by row."""

from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import KINDS, Kind, normal, tiny_flow, video
from torch import Tensor

from sfv_world.decoding.frames import FrameReport, StreamState, imagine_frame, read_frame, read_video
from sfv_world.decoding.solver import DecodingConfig, Draft, Solution, draft_tokens, solve
from sfv_world.flow.model import VideoFlow
from sfv_world.flow.shallow import Stage

DRAFTS: tuple[Draft, ...] = ("fields", "tokens", "noise", "zeros")

law = partial(settings, deadline=None, derandomize=True, database=None)
close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
exact = partial(torch.testing.assert_close, rtol=0, atol=0)
seeds = st.integers(0, 10_000)
each_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


def imagine(
    flow: VideoFlow, past: Tensor, controls: Tensor | None, noise: Tensor, config: DecodingConfig
) -> tuple[Tensor, list[FrameReport], StreamState]:
    """Reads the past and decodes a frame for every frame of noise: their tokens, their reports and where they end."""
    known = past.shape[1]
    state, _ = read_video(flow, past, None if controls is None else controls[:, :known])
    tokens, reports = [], []
    for n in range(noise.shape[1]):
        action = None if controls is None else controls[:, known + n]
        reports.append(imagine_frame(flow, state, noise[:, n], action, config))
        tokens.append(state.tokens)
    return torch.stack(tokens, dim=1), reports, state


# Frames --------------------------------------------------------------------------------------------------------------


@each_kind
@given(known=st.integers(1, 5), window=st.integers(1, 3), controlled=st.booleans(), seed=seeds)
@law(max_examples=6)
def test_noise_of_a_video_decodes_to_the_video(
    kind: Kind, known: int, window: int, controlled: bool, seed: int
) -> None:
    flow = tiny_flow(kind, window=window, seed=seed, dtype=torch.float64)
    tokens, controls = video(flow, 2, 6, seed)
    given_controls = controls if controlled else None
    encoding = flow(tokens, given_controls)
    config = DecodingConfig(tolerance=1e-8)
    decoded, reports, _ = imagine(flow, tokens[:, :known], given_controls, encoding.noise[:, known:], config)
    close(decoded, tokens[:, known:], rtol=0, atol=1e-6)
    close(torch.stack([r.log_prob for r in reports], 1), encoding.log_prob[:, known:], rtol=0, atol=1e-5)
    close(torch.stack([r.features for r in reports], 1), encoding.features[:, known:], rtol=0, atol=1e-5)


@each_kind
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("block", [None, 1, 4, 5])
def test_every_way_of_decoding_gives_the_sequential_answer(kind: Kind, draft: Draft, block: int | None) -> None:
    flow = tiny_flow(kind, grid=(2, 3), window=2, dtype=torch.float64)
    tokens, controls = video(flow, 2, 4)
    noise = normal(2, 2, 6, 3, seed=7, dtype=torch.float64)
    whole = torch.cat([flow(tokens[:, :2], controls[:, :2]).noise, noise], dim=1)
    expected = flow.inverse(whole, controls)[:, 2:]
    config = DecodingConfig(tolerance=1e-8, draft=draft, block=block)
    decoded, reports, _ = imagine(flow, tokens[:, :2], controls, noise, config)
    close(decoded, expected, rtol=0, atol=1e-6)
    for report in reports:
        assert (report.certificate <= 1e-8).all()
        if block == 1:  # a lone token is exact after its one pass
            assert report.shallow_sweeps.tolist() == [4 + 1 if kind == "bands" else 2 * 6 + 2] * 2
            assert report.sweeps.tolist() == [6 if kind == "autoregressive" else 1] * 2


@each_kind
@pytest.mark.parametrize("config", [{}, {"tolerance": 0.5}, {"max_sweeps": 1}, {"max_sweeps": 2, "block": 3}])
@pytest.mark.parametrize("draft", ["fields", "zeros"])
def test_a_report_is_that_of_the_frame(kind: Kind, config: dict[str, Any], draft: Draft) -> None:
    """However far the solver got: a parallel pass over the decoded tokens says the same, and so does what follows."""
    flow = tiny_flow(kind, grid=(3, 3))
    tokens, controls = video(flow, 3, 4)
    noise = normal(3, 2, 9, 3, seed=7)
    decoding = DecodingConfig(draft=draft, **config)
    decoded, reports, state = imagine(flow, tokens[:, :2], controls, noise, decoding)
    encoding = flow(torch.cat([tokens[:, :2], decoded], dim=1), controls)
    for n, report in enumerate(reports):
        close(report.log_prob, encoding.log_prob[:, 2 + n])
        close(report.noise, encoding.noise[:, 2 + n])
        close(report.features, encoding.features[:, 2 + n])
        close(report.certificate, (report.noise - noise[:, n]).abs().amax((1, 2)))
        if "max_sweeps" in config and kind != "bands":  # which are exact after one pass each
            assert (report.certificate > 10 * decoding.tolerance).all()
        else:
            assert (report.certificate < decoding.tolerance).all()
    read = read_video(flow, torch.cat([tokens[:, :2], decoded], dim=1), controls)[0]
    close(state.cache.keys, read.cache.keys)
    close(state.cache.values, read.cache.values)
    for ours, theirs in zip(state.stages, read.stages, strict=True):
        close(ours.tokens, theirs.tokens)


@each_kind
def test_imagining_and_reading_end_in_the_same_state(kind: Kind) -> None:
    flow = tiny_flow(kind)
    tokens, controls = video(flow, 2, 5)
    decoded, reports, imagined = imagine(flow, tokens[:, :3], controls, normal(2, 1, 4, 3, seed=7), DecodingConfig())
    read, _ = read_video(flow, tokens[:, :3], controls[:, :3])
    report = read_frame(flow, read, decoded[:, 0], controls[:, 3])
    close(report.log_prob, reports[0].log_prob)
    next_imagined = read_frame(flow, imagined, tokens[:, 4], controls[:, 4])
    close(next_imagined.log_prob, read_frame(flow, read, tokens[:, 4], controls[:, 4]).log_prob)


@each_kind
@pytest.mark.parametrize("config", [{}, {"tolerance": 0.3}, {"tolerance": 0.3, "block": 3}, {"max_sweeps": 2}])
def test_a_row_decodes_as_it_would_alone(kind: Kind, config: dict[str, Any]) -> None:
    """Far closer than the tolerance, although rows start well or badly and some take more than one attempt."""
    flow = tiny_flow(kind, grid=(1, 7), blocks=3, scale=0.25, dtype=torch.float64)
    tokens, controls = video(flow, 3, 5)
    noise = normal(3, 2, 7, 3, seed=7, dtype=torch.float64)
    noise[2] *= 3  # a hard neighbour
    decoding = DecodingConfig(**config)
    many, reports, _ = imagine(flow, tokens[:, :3], controls, noise, decoding)
    for row in range(3):
        one = slice(row, row + 1)
        alone, own, _ = imagine(flow, tokens[one, :3], controls[one], noise[one], decoding)
        close(alone[0], many[row], rtol=0, atol=1e-9)
        for ours, theirs in zip(own, reports, strict=True):
            close(ours.log_prob[0], theirs.log_prob[row], rtol=0, atol=1e-9)
            assert (ours.shallow_sweeps[0], ours.sweeps[0]) <= (theirs.shallow_sweeps[row], theirs.sweeps[row])


@each_kind
@given(tolerance=st.sampled_from([1e-1, 1e-2, 1e-3]), seed=seeds)
@law(max_examples=12)
def test_a_frame_is_within_its_tolerance(kind: Kind, tolerance: float, seed: int) -> None:
    """Also where the maps are steep enough for what one block leaves open to outgrow it in the next."""
    flow = tiny_flow(kind, grid=(1, 7), blocks=3, scale=0.25, seed=seed, dtype=torch.float64)
    tokens, controls = video(flow, 2, 3, seed)
    noise = normal(2, 1, 7, 3, seed=seed + 7, dtype=torch.float64)
    _, (report,), _ = imagine(flow, tokens[:, :2], controls, noise, DecodingConfig(tolerance=tolerance))
    assert (report.certificate <= tolerance).all()


def test_settled_tokens_are_not_evaluated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sweep settles a token or more, so what sweeps evaluate shrinks from the front."""
    flow = tiny_flow("autoregressive", grid=(2, 4), scale=0.25)
    tokens, controls = video(flow, 1, 4)
    begins, decode = [], flow.deep.decode
    monkeypatch.setattr(flow.deep, "decode", lambda s, c, at, *rest: begins.append(at.start) or decode(s, c, at, *rest))
    noise = normal(1, 1, 8, 3, seed=7)
    _, (report,), _ = imagine(flow, tokens[:, :3], controls, noise, DecodingConfig(tolerance=1e-4, draft="zeros"))
    assert len(begins) == report.sweeps.item() > 3
    assert begins[0] == 0 and begins == sorted(begins) and begins[-1] >= len(begins) - 2


@each_kind
def test_a_row_that_is_not_a_number_harms_no_other(kind: Kind) -> None:
    flow = tiny_flow(kind)
    tokens, controls = video(flow, 2, 5)
    noise = normal(2, 2, 4, 3, seed=7)
    expected, _, _ = imagine(flow, tokens[:, :3], controls, noise, DecodingConfig())
    noise[1, 0, 2, 1] = torch.nan
    decoded, reports, _ = imagine(flow, tokens[:, :3], controls, noise, DecodingConfig())
    close(decoded[0], expected[0], rtol=1e-5, atol=1e-5)
    assert reports[0].certificate.isnan().tolist() == [False, True]
    assert reports[0].log_prob[1].isnan().any() and not reports[1].log_prob[0].isnan().any()


# The solver ----------------------------------------------------------------------------------------------------------


class Puzzle:
    """A deep block, six tokens a frame, with a frame behind it; which tokens have the given noise?"""

    def __init__(self, rows: int = 2, dtype: torch.dtype = torch.float64, seed: int = 0):
        flow = tiny_flow("autoregressive", grid=(2, 3), dtype=dtype, seed=seed)
        self.block, (past, controls) = flow.deep, video(flow, rows, 1, seed)
        self.cache, self.controls = self.block.new_cache(rows), controls[:, 0]
        start = self.block.sos_embed.expand(rows, -1, -1)
        self.before = self.block.inverse(past[:, 0], self.cache, start)[:, -1:]
        self.cache.advance()
        self.noise = normal(rows, 6, 3, seed=seed + 9, dtype=dtype)
        self.answer = self.block.inverse(self.noise, self.fresh, self.before, self.controls)

    @property
    def fresh(self) -> Any:
        """A copy of the cache."""
        return self.cache.rows(torch.arange(len(self.cache.visible)))

    def solve(self, draft: Tensor, cache: Any = None, **config: Any) -> Solution:
        """The solver's answer, to 1e-9 if nothing else is said."""
        config = {"tolerance": 1e-9, "size": None, "max_sweeps": None} | config
        where = {"before": self.before, "controls": self.controls}
        return solve(self.block, self.noise, draft, cache or self.fresh, **config, **where)


@given(scale=st.sampled_from([0.0, 1.0, 10.0]), size=st.sampled_from([None, 1, 2, 4, 100]), seed=seeds)
@law(max_examples=10)
def test_the_solver_inverts_from_any_draft(scale: float, size: int | None, seed: int) -> None:
    puzzle = Puzzle(seed=seed)
    cache = puzzle.fresh
    solution = puzzle.solve(scale * normal(2, 6, 3, seed=seed, dtype=torch.float64), cache, size=size)
    close(solution.tokens, puzzle.answer, rtol=0, atol=1e-7)
    assert (solution.certificate < 1e-9).all()
    assert (solution.sweeps <= (6 if size == 1 else 9)).all()  # a block of k tokens takes at most k + 1
    # The cache holds the keys and values of the answer: what one pass over it writes.
    other = puzzle.fresh
    carried = torch.cat([puzzle.before, solution.tokens[:, :-1]], dim=1)
    close(puzzle.block.decode(carried, other, controls=puzzle.controls), solution.features, rtol=0, atol=1e-7)
    close(cache.keys, other.keys, rtol=0, atol=1e-7)
    close(cache.values, other.values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sweeps", range(1, 7))
def test_every_sweep_makes_one_more_token_exact(sweeps: int) -> None:
    """And it returns the iterate it evaluated: after k sweeps, the one that k - 1 updates led to."""
    puzzle = Puzzle()
    solution = puzzle.solve(normal(2, 6, 3, seed=3, dtype=torch.float64), max_sweeps=sweeps)
    error = (solution.tokens - puzzle.answer).abs().amax((0, 2))
    assert (error[: sweeps - 1] < 1e-12).all() and (error[sweeps - 1 :] > 1e-12).any()
    assert (solution.certificate > 1e-9).all() and (solution.sweeps == sweeps).all()


@pytest.mark.parametrize("size", [1, 2, 4, 5, None])
@pytest.mark.parametrize("sweeps", [1, 2])
def test_the_certificate_is_the_worst_of_all_blocks(size: int | None, sweeps: int) -> None:
    puzzle = Puzzle(rows=3)
    solution = puzzle.solve(normal(3, 6, 3, seed=3, dtype=torch.float64), size=size, max_sweeps=sweeps)
    carried = torch.cat([puzzle.before, solution.tokens[:, :-1]], dim=1)
    fields = puzzle.block.fields(puzzle.block.decode(carried, puzzle.fresh, controls=puzzle.controls))
    found, _ = fields.normalise(solution.tokens)
    close(solution.certificate, (found - puzzle.noise).abs().amax((1, 2)), rtol=0, atol=1e-12)


def test_rows_finish_when_they_are_done() -> None:
    puzzle = Puzzle(rows=4)
    draft = puzzle.answer.clone()
    draft[1], draft[3, -1] = 0, 0  # row 1 is all to do; of row 3, only the last token, on which nothing depends
    solution = puzzle.solve(draft)
    assert solution.sweeps.tolist() == [1, 7, 1, 2]
    exact(solution.tokens[[0, 2]], puzzle.answer[[0, 2]])
    close(solution.tokens, puzzle.answer, rtol=0, atol=1e-8)


@given(size=st.sampled_from([None, 2, 4]), seed=seeds)
@law(max_examples=6)
def test_a_neighbour_changes_nothing(size: int | None, seed: int) -> None:
    """An easy row beside an easy one and beside a hard one: bit for bit the same. A hard row is it to rounding."""
    puzzle = Puzzle(rows=2, dtype=torch.float32, seed=seed)
    hard = puzzle.answer + normal(2, 6, 3, seed=seed)
    easy = puzzle.answer
    results = {}
    for name, drafts in {"easy": (easy[0], easy[1]), "hard": (easy[0], hard[1]), "both": (hard[0], hard[1])}.items():
        results[name] = puzzle.solve(torch.stack(drafts), tolerance=1e-4, size=size)
    assert (results["easy"].sweeps == results["hard"].sweeps).tolist() == [True, False]
    exact(results["easy"].tokens[0], results["hard"].tokens[0])
    exact(results["easy"].features[0], results["hard"].features[0])
    close(results["hard"].tokens[1], results["both"].tokens[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [None, 2, 4])
@pytest.mark.parametrize("limit", [None, 2, 3])
def test_learning_late_of_convergence_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, size: int | None, limit: int | None
) -> None:
    """As on a GPU, where a sweep begins before it is known how far the one before it came."""
    puzzle = Puzzle(rows=4)
    draft = puzzle.answer.clone()
    draft[1], draft[3, -1] = 0, 0
    found = {}
    for behind in (0, 1, 2):
        monkeypatch.setattr("sfv_world.decoding.solver.BEHIND", {"cpu": behind})
        cache = puzzle.fresh
        found[behind] = puzzle.solve(draft, cache, size=size, max_sweeps=limit), cache
    for solution, cache in (found[1], found[2]):
        exact(solution.sweeps, found[0][0].sweeps)
        for ours, theirs in zip(solution, found[0][0], strict=True):
            close(ours, theirs, rtol=0, atol=1e-12)
        close(cache.keys, found[0][1].keys, rtol=0, atol=1e-12)
        close(cache.values, found[0][1].values, rtol=0, atol=1e-12)


def test_drafts_are_what_they_are_called() -> None:
    flow = tiny_flow("autoregressive")
    tokens, _ = video(flow, 2, 3)
    encoding, (state, _) = flow(tokens, None), read_video(flow, tokens, None)
    deep, noise = state.stages[0], normal(2, 4, 3, seed=5)
    close(draft_tokens(noise, deep, "fields"), encoding.fields.mu[:, -1] + encoding.fields.sigma[:, -1] * noise)
    close(draft_tokens(noise, deep, "tokens"), encoding.latents[:, -1])
    exact(draft_tokens(noise, deep, "noise"), noise)
    exact(draft_tokens(noise, deep, "zeros"), torch.zeros_like(noise))
    assert isinstance(deep, Stage)


def test_an_untrained_draft_network_says_what_the_fields_say() -> None:
    flow = VideoFlow(tiny_flow("autoregressive").config)
    tokens, controls = video(flow, 2, 3)
    state, _ = read_video(flow, tokens, controls)
    deep, noise = state.stages[0], normal(2, 4, 3, seed=5)
    close(flow.draft(noise, deep, controls[:, 0]), draft_tokens(noise, deep, "fields"))


@torch.enable_grad()
def test_a_learned_draft_learns_from_the_forward_pass_and_moves_nothing_else() -> None:
    flow = tiny_flow("autoregressive")
    tokens, controls = video(flow, 2, 4)
    drafter = torch.optim.Adam(flow.drafter.parameters(), lr=0.01)
    errors = []
    for _ in range(60):
        error = flow.draft_error(flow(tokens, controls), controls).mean()
        errors.append(error.item())
        drafter.zero_grad()
        error.backward()
        drafter.step()
    assert errors[-1] < 0.5 * errors[0]
    moved = {name.split(".")[0] for name, parameter in flow.named_parameters() if parameter.grad is not None}
    assert moved == {"drafter"}


def test_a_learned_draft_decodes_to_the_same_frame() -> None:
    flow = tiny_flow("autoregressive", grid=(2, 3))
    tokens, controls = video(flow, 1, 4)
    noise = flow(tokens, controls).noise[:, 3:]
    found = {
        draft: imagine(flow, tokens[:, :3], controls, noise, DecodingConfig(draft=draft, tolerance=1e-4))
        for draft in ("zeros", "learned")
    }
    close(found["learned"][0], found["zeros"][0], rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match=r"draft: expected .* without a draft network, got 'learned'"):
        other = tiny_flow("frame-parallel", grid=(2, 3))
        imagine(other, tokens[:, :3], controls, noise, DecodingConfig(draft="learned"))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tolerance": 0.0}, "tolerance: expected a positive number, got 0.0"),
        ({"tolerance": float("nan")}, "tolerance: expected a positive number, got nan"),
        ({"block": 0}, "block: expected None or at least 1, a whole number, got 0"),
        ({"max_sweeps": -1}, "max_sweeps: expected None or at least 1, a whole number, got -1"),
        ({"temperature": -0.5}, "temperature: expected at least 0, got -0.5"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DecodingConfig(**(asdict(DecodingConfig()) | wrong))
