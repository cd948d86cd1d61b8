"""A CUDA device, pretended on a machine that has none: `python -m pytest -p pretended -m gpu`, with this folder on the path.

Its tensors compute on the host, but by a GPU's rules: an operation on tensors of both raises; what makes the host wait for the
device raises under `torch.cuda.set_sync_debug_mode("error")`; a CUDA graph is the operations that were recorded, on the very
tensors they had, and nothing may wait while it is. What kernels, streams and clocks do, a real device alone can show.
"""

import contextlib
import ctypes
import os
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def load_hooks() -> None:
    """Compiles and loads the C++ beside this file, before torch asks for the first time what devices there are."""
    torch_folder = Path(find_spec("torch").origin).parent
    libraries = [torch_folder / "lib" / f"lib{name}.so" for name in ("c10", "torch_cpu")]
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "pretended.so"
        command = [os.environ.get("CXX", "c++"), "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        subprocess.run([*command, Path(__file__).with_suffix(".cpp"), *libraries, "-o", compiled], check=True)
        for library in (*libraries, compiled):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_hooks()

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import (  # noqa: E402
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)
ANSWERS = {
    aten._local_scalar_dense,
    aten.equal,
    aten.is_nonzero,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
}
"""Operations whose result, or its shape, the host is to know."""
INDEXED = {aten.index, aten._index_put_impl_, aten.index_put, aten.index_put_}

tape: list[tuple[Any, Any, Any, Any]] | None = None
"""Of the CUDA graph that is being recorded."""
waiting = "default"
"""The mode of `torch.cuda.set_sync_debug_mode`."""
warned = False
"""Whether that was set before."""


class There(Tensor):
    """A tensor on the device; `here` are its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        shape = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        made = Tensor._make_wrapper_subclass(cls, here.shape, **shape, device=DEVICE, requires_grad=here.requires_grad)
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})

    def __tensor_flatten__(self) -> tuple[list[str], None]:  # by which modules know to exchange their parameters
        return ["here"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> "There":
        return There(parts["here"])

    def __repr__(self, **_: Any) -> str:
        return f"{self.here!r} on {DEVICE}"

    def __format__(self, how: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), how)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first.")

    numpy = __array__

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        copy = self.detach().clone()
        return nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy

    def record_stream(self, stream: Any) -> None:
        pass


class Device(TorchDispatchMode):
    """Makes tensors on the device where one is asked for."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(function, args, kwargs or {})


def wait(why: Any) -> None:
    """The host waits for the device."""
    if waiting == "error" or tape is not None:
        raise RuntimeError(f"called a synchronizing CUDA operation: {why}")


def dispatch(function: Any, args: Any, kwargs: Any) -> Any:
    """Computes on the host what the device is to compute, if it is allowed to."""
    kind, leaves = function.overloadpacket, tree_leaves((args, kwargs))
    there = [x for x in leaves if isinstance(x, There)]
    asked = kwargs.get("device")
    on_device = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if kind is aten.is_pinned:
        return hasattr(args[0], "pinned")
    if kind is aten._pin_memory:
        copy = args[0].clone()
        copy.pinned = True
        return copy
    if kind in (aten._to_copy, aten.copy_):
        source, target = args[kind is aten.copy_], isinstance(args[0], There) if kind is aten.copy_ else on_device
        if isinstance(source, There) != target:
            queued = kwargs.pop("non_blocking", False) or args[2:] == (True,)
            if not queued or (target and not hasattr(source, "pinned")):
                wait(function)
            if tape is not None:
                raise RuntimeError("copied between host and device while a graph was recorded")
    elif there:
        for x in leaves:
            if isinstance(x, Tensor) and not isinstance(x, There) and x.dim():
                if kind not in INDEXED or not any(x is index for index in args[1]):
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but got {DEVICE} and cpu: {function}"
                    )
                wait(function)
        if kind in ANSWERS or (kind in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])):
            wait(function)
    mine = tree_map(_here, args), tree_map(_here, {k: v for k, v in kwargs.items() if k != "pin_memory"})
    found = function(*mine[0], **mine[1])
    if not on_device:
        return found
    if tape is not None and not function.is_view:
        tape.append((function, *mine, found))
    made = tree_map(lambda x: There(x) if isinstance(x, Tensor) else x, found)
    return return_and_correct_aliasing(function, args, kwargs, made) if there else made


def _here(x: Any) -> Any:
    if isinstance(x, torch.device):
        return torch.device("cpu") if x.type == DEVICE.type else x
    return x.here if isinstance(x, There) else x


class Graph:
    """The operations of a recording, to be done again on the same memory."""

    def __init__(self) -> None:
        self.tape: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch.no_grad(), _disable_current_modes():
            for function, args, kwargs, found in self.tape:
                for old, new in zip(tree_leaves(found), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old is not new:
                        old.copy_(new)


@contextlib.contextmanager
def record(graph: Graph, stream: Any = None) -> Iterator[None]:
    """As `torch.cuda.graph`, whose own stream is of the device that was recorded on first."""
    global tape
    if stream is None:
        raise RuntimeError("recorded in a stream that may be another device's")
    tape = graph.tape
    try:
        yield
    finally:
        tape = None


class Ordered:
    """A stream or an event of a device that does everything in order."""

    device = DEVICE

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait(self, other: Any = None) -> None:
        pass

    wait_stream = record = wait

    def record_event(self) -> "Ordered":
        return Ordered()

    def synchronize(self) -> None:
        if tape is not None:
            wait("synchronize")


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """As `F.scaled_dot_product_attention`, of which a build without CUDA has no kernel for the device."""
    if not isinstance(q, There):
        return _attention(q, k, v, attn_mask=attn_mask, **options)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, float("-inf"))
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, **options)[0]


class Generator(torch.Generator):
    """Its numbers are the host's."""

    def __new__(cls, device: Any = None) -> "Generator":
        return super().__new__(cls)


def set_sync_debug_mode(mode: str) -> None:
    """As that of `torch.cuda`, which warns of itself, once, when it has set the mode."""
    global waiting, warned
    waiting, first, warned = mode, not warned, True
    if first:
        warnings.warn("Synchronization debug mode is a prototype feature and does not yet detect ...", stacklevel=2)


_attention, _run = F.scaled_dot_product_attention, threading.Thread.run


def _run_with_device(thread: threading.Thread) -> None:
    with Device():  # modes are each thread's own
        _run(thread)


def install() -> None:
    """From now on this process has the device."""
    instead = dict(
        is_available=lambda: True,
        is_initialized=lambda: True,
        is_bf16_supported=lambda *_, **__: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        synchronize=lambda *_: Ordered().synchronize(),
        current_stream=Ordered,
        Stream=Ordered,
        Event=Ordered,
        stream=contextlib.nullcontext,
        device=contextlib.nullcontext,
        CUDAGraph=Graph,
        graph=record,
        set_sync_debug_mode=set_sync_debug_mode,
        mem_get_info=lambda *_: (2**36, 2**37),
        memory_allocated=lambda *_: 0,
        memory_reserved=lambda *_: 0,
        get_device_name=lambda *_: "pretended",
        _lazy_init=lambda: None,
    )
    for name, value in instead.items():
        setattr(torch.cuda, name, value)
    torch.Generator, F.scaled_dot_product_attention, threading.Thread.run = Generator, attention, _run_with_device
    Device().__enter__()


install()
