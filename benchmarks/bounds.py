"""What bounds a step: where its time goes, and how little would do at the machine's measured rates.

A step's arithmetic takes at least its operations over the machine's matrix multiplication rate; its memory traffic, if
nothing stays in a cache, its bytes over the copy rate; starting its operations, their number times what the smallest one
takes. What is left of the measured time is lost between: by operations too small to reach those rates, and by Python.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from report import Rows, synchronise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from sfv_world.envs.vector_env import WorldVectorEnv
from sfv_world.world import World

DEEP, SHALLOW, SOLVER, NOISE = "deep flow", "shallow flow", "solver", "sampling noise"
OUTSIDE, ENVIRONMENT = "codec, controls, heads", "environment"


class Rates(NamedTuple):
    """What a machine does, measured."""

    flops: float
    """Floating point operations a second, in a large float32 matrix product."""
    bytes: float
    """Bytes a second, read and written, in a large copy."""
    start: float
    """Seconds that the smallest operation takes."""


class Work(NamedTuple):
    """What one step of a batch asks of a machine."""

    flops: int
    """Floating point operations of matrix products and attention."""
    bytes: int
    """Bytes that operations read and write."""
    calls: int
    """Operations started, views not counted."""


def measure_rates(device: torch.device) -> Rates:
    """Measures a machine, in about a second."""
    small = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(1000):
            small.add_(1)

    def multiply(side: int) -> tuple[int, Callable[[], Any]]:
        a, b = torch.rand(2, side, side, device=device)
        return 2 * side**3, lambda: a @ b

    def copy(size: int) -> tuple[int, Callable[[], Any]]:
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2 * size, lambda: target.copy_(source)

    return Rates(
        flops=_rate(map(multiply, (1024, 2048, 4096, 8192)), device),
        bytes=_rate(map(copy, (2**27, 2**28, 2**29, 2**30)), device),
        start=_best_time(many, device) / 1000,
    )


def count_work(step: Callable[[], Any]) -> Work:
    """Runs a step once and counts what it does."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _attention_flops}) as counter, _Tally() as tally:
        step()
    return Work(counter.get_total_flops(), tally.bytes, tally.calls)


class Stopwatch:
    """Seconds by label, every moment counted once: for the label that was entered last."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Counts what runs inside for `name`."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its time counted for `name`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            with self.label(name):
                return function(*arguments, **options)

        return timed

    def _switch(self) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def watched(world: World) -> Iterator[Stopwatch]:
    """A stopwatch over all parts of a world while it steps.

    The parts are found by their public methods. What `World.step` does itself is drawing the frame's noise (and the
    end of its episode) and bringing it to the device; what `imagine_frame` does itself is the solver's: drafts, certificates,
    picking rows.
    """
    watch, flow = Stopwatch(world.device), world.model.flow
    parts: list[tuple[str, nn.Module]] = [(DEEP, flow.deep), (SHALLOW, flow.shallow)]
    parts += [(SHALLOW, block) for block in flow.shallow.blocks]
    parts += [(OUTSIDE, part) for part in (world.model.codec, world.model.controls, world.model.heads)]
    with ExitStack() as patches:
        for name, part in parts:
            for method in _public_methods(type(part)):
                patches.enter_context(patch.object(part, method, watch.wrap(name, getattr(part, method))))
        patches.enter_context(patch.object(world, "step", watch.wrap(NOISE, world.step)))
        imagine_frame = watch.wrap(SOLVER, world.model.imagine_frame)
        patches.enter_context(patch.object(world.model, "imagine_frame", imagine_frame))
        yield watch


def share_of_steps(world: World, rows: int, steps: int, output: str) -> Rows:
    """Milliseconds a step, and part of it, that each part of a batch of worlds takes."""
    envs = WorldVectorEnv(rows, world=world, max_episode_steps=75, output=output)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    envs.step(envs.action_space.sample())  # warm
    with watched(envs.world) as watch:
        for _ in range(steps):
            with watch.label(ENVIRONMENT):
                envs.step(envs.action_space.sample())
    total = sum(watch.seconds.values())
    names = (DEEP, SHALLOW, SOLVER, NOISE, OUTSIDE, ENVIRONMENT)
    return [
        {
            "batch": rows,
            "part": name,
            "ms_a_step": 1000 * watch.seconds[name] / steps,
            "share": watch.seconds[name] / total,
        }
        for name in names
    ]


def bounds_of_steps(world: World, rows: int, steps: int, rates: Rates, measured: float) -> dict[str, Any]:
    """What a batch's step asks of the machine, and what of its `measured` ms that would take at the machine's rates.

    The rest is what small operations lose against large ones, and Python between them.
    """
    state = world.start(list(range(rows)))

    def several() -> None:
        nonlocal state
        for _ in range(steps):
            state, _ = world.step(state, None)

    work = count_work(several)
    needs = {
        "arithmetic": 1000 * work.flops / rates.flops / steps,
        "memory": 1000 * work.bytes / rates.bytes / steps,
        "starting operations": 1000 * work.calls * rates.start / steps,
    }
    parts = {**needs, "small operations and Python": max(0.0, measured - sum(needs.values()))}
    return {
        "batch": rows,
        "gflop_a_frame": work.flops / steps / rows / 1e9,
        "mb_a_frame": work.bytes / steps / rows / 1e6,
        "operations_a_step": round(work.calls / steps),
        "ms_a_step": measured,
        **parts,
        "most": max(parts, key=lambda name: parts[name]),
    }


class _Tally(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of what goes into them and comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.calls += 1
            leaves = tree_leaves((args, kwargs or {}, found))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return found


def _public_methods(kind: type) -> set[str]:
    """Names of a module's own methods, those of `nn.Module` left out."""
    kinds = [base for base in kind.mro() if issubclass(base, nn.Module) and base is not nn.Module]
    methods = {name for base in kinds for name, value in vars(base).items() if isinstance(value, FunctionType)}
    return {name for name in methods if not name.startswith("_")}


def _attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Operations of attention, from its shapes (rows, heads, length, channels); a causal mask saves nothing here."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def _rate(jobs: Iterable[tuple[int, Callable[[], Any]]], device: torch.device, least: float = 0.005) -> float:
    """Amount of work a second in the first job that takes `least` seconds or more, else in the last."""
    rate = 0.0
    for amount, work in jobs:
        seconds = _best_time(work, device)
        rate = amount / seconds
        if seconds >= least:
            break
    return rate


def _best_time(work: Callable[[], Any], device: torch.device, least: float = 0.2) -> float:
    """Seconds of the fastest of several runs, which take `least` seconds together or more."""
    work()
    synchronise(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        began = time.perf_counter()
        work()
        synchronise(device)
        times.append(time.perf_counter() - began)
    return min(times)
