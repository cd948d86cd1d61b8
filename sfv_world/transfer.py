"""Between host and device without waiting: copies are queued behind the work that is under way, from and to pinned memory.

The lowest room beside `layers`: whoever steps a world hands arrays over with `to_device` and takes results back with `Fetch`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def to_device(array: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """The array on `device`, shared if it is there already; the host does not wait for the copy."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the host, in pinned memory: all of them are waited for at once, and only when they are needed."""

    def __init__(self, tensors: Iterable[Tensor]):
        self._tensors = list(tensors)
        device = self._tensors[0].device if self._tensors else torch.device("cpu")
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in self._tensors]
        self._arrived = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def wait(self) -> list[np.ndarray]:
        """Arrays of the caller's own."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return [tensor.numpy().copy() for tensor in self._tensors]
