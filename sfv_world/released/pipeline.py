"""Work that follows the deep flow: on a CUDA device behind it, in a second stream; on a CPU in plain order.

The deep flow never waits for what follows it (STARFlow-V, arXiv 2511.20462). Decoding asks the device after every sweep whether
it is done, so the follower needs a thread as well as a stream.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor


class Follower:
    """Runs pieces of work one after the other, in the order given; leaving waits for the last one, as does the device.

    Args:
        device: where the work computes.
        behind: whether it may run behind the deep flow; otherwise in plain order, whatever the device.

    An error in a piece of work is raised by `submit`, by a later one on a CUDA device, or when the context is left.
    """

    def __init__(self, device: torch.device, behind: bool = True):
        self.stream = torch.cuda.Stream(device) if behind and device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1) if self.stream else None
        self.pending: deque[Future[None]] = deque()

    def __enter__(self) -> "Follower":
        return self

    def submit(self, work: Callable[..., None], *tensors: Tensor) -> None:
        """Runs `work(*tensors)`, once the device has computed the tensors."""
        if self.stream is None or self.thread is None:
            work(*tensors)
            return
        while self.pending and self.pending[0].done():
            self.pending.popleft().result()
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.stream.device))
        self.pending.append(self.thread.submit(self._run, self.stream, ready, work, tensors))

    @staticmethod
    def _run(
        stream: torch.cuda.Stream, ready: torch.cuda.Event, work: Callable[..., None], tensors: tuple[Tensor, ...]
    ) -> None:
        with torch.cuda.stream(stream):
            ready.wait(stream)
            for tensor in tensors:
                tensor.record_stream(stream)
            work(*tensors)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.stream is None or self.thread is None:
            return
        self.thread.shutdown(wait=True, cancel_futures=error is not None)
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
        if error is None:
            for future in self.pending:
                future.result()
