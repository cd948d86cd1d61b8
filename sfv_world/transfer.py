"""Between host and device without waiting: copies are queued behind the work that is under way, from and to pinned memory.

The lowest room beside `layers`: whoever steps a world hands arrays over with `to_device` and takes results back with `Fetch`.
What a caller gives is read with `to_host`, which waits for it.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on `device`, shared if it is there already; the host does not wait for the copy."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_host(values: Any, name: str) -> np.ndarray:
    """An array of a tensor on any device, or of what NumPy makes one of; shared if it is one on the host already.

    Raises:
        ValueError: if they make none; it calls them by their name.
    """
    if isinstance(values, Tensor):
        return values.detach().cpu().numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{name}: expected an array, got lists that make none ({error}).") from error


class Fetch:
    """Tensors, as they are now, on their way to the host: waited for all at once, and only when they are needed."""

    def __init__(self, tensors: Iterable[Tensor]):
        there = list(tensors)
        self._here = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in there]  # pinned, if from a GPU
        self._arrived: torch.cuda.Event | None = None
        if there and there[0].is_cuda:
            self._arrived = torch.cuda.current_stream(there[0].device).record_event()

    def wait(self) -> list[np.ndarray]:
        """Arrays of the caller's own."""
        if self._arrived is None:
            return [tensor.numpy() for tensor in self._here]
        self._arrived.synchronize()
        return [tensor.numpy().copy() for tensor in self._here]  # pinned memory is scarce: it is not for keeping
