"""CUDA graphs: a function of tensors whose kernels are recorded once and replayed, at the cost of one launch.

Whatever is not a tensor is part of the recording: who records says by a key which recording it means. A function's tensors
may be copied in and out, so neither the caller's nor those of an earlier call are ever shared.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before recording: what is compiled, chosen or allocated at first use is then there."""

Function = Callable[..., Sequence[Tensor]]


def record(
    function: Function, inputs: Sequence[Tensor], aside: torch.cuda.Stream
) -> tuple[Callable[[], None], Sequence[Tensor]]:
    """Records `function` of `inputs`: (how to replay it, where its outputs then are); it may change `inputs`.

    It does so in a stream of the inputs' device: torch's own is of the device that was recorded on first.
    """
    with torch.cuda.device(inputs[0].device):
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                function(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=aside):
            outputs = function(*inputs)
    return graph.replay, outputs


class Recorder:
    """Recordings by key and shapes; those of the same shapes share the memory of their inputs."""

    def __init__(self) -> None:
        self._inputs: dict[Hashable, list[Tensor]] = {}
        self._recordings: dict[Hashable, tuple[Callable[[], None], Sequence[Tensor]]] = {}
        self._aside: torch.cuda.Stream | None = None

    def __reduce__(self) -> tuple[type["Recorder"], tuple[()]]:
        """Copies record anew: a recording is of the very memory that it was made in."""
        return Recorder, ()

    def __call__(self, function: Function, inputs: Sequence[Tensor], key: Hashable) -> list[Tensor]:
        """`function` of `inputs`, which it leaves as they are; recorded first if none with this key and shapes is."""
        shapes = tuple(x.shape for x in inputs)
        if shapes not in self._inputs:
            self._inputs[shapes] = [torch.empty_like(x) for x in inputs]
        own = self._inputs[shapes]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        if (key, shapes) not in self._recordings:
            self._aside = self._aside or torch.cuda.Stream(own[0].device)
            self._recordings[key, shapes] = record(function, own, self._aside)
            for mine, given in zip(own, inputs, strict=True):  # warming up may have changed them
                mine.copy_(given)
        replay, outputs = self._recordings[key, shapes]
        replay()
        return [x.clone() for x in outputs]
