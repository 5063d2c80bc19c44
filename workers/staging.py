"""Host numbers on their way to the device, without the host waiting for the device."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_BUFFERS = 4  # more than there are steps in flight, so that a buffer is free again when its turn comes


class Staging:
    """Packs arrays into one pinned buffer and copies them at once. On CPU there is nothing to copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: list[_Pinned] = []
        self._turn = 0

    def send(self, arrays: Sequence[npt.NDArray[np.int64]]) -> list[Tensor]:
        """The arrays as int32 tensors on the device. Values must fit."""
        if self._device.type == "cpu":
            return [torch.from_numpy(array.astype(np.int32)) for array in arrays]
        ends = np.cumsum([array.size for array in arrays])
        buffer = self._next(int(ends[-1]))
        host = buffer.host.numpy()
        for array, end in zip(arrays, ends.tolist(), strict=True):
            host[end - array.size : end] = array
        packed = buffer.host[: ends[-1]].to(self._device, non_blocking=True)
        buffer.copied.record()
        return list(packed.split([array.size for array in arrays]))

    def _next(self, size: int) -> "_Pinned":
        if len(self._buffers) < NUM_BUFFERS:
            self._buffers.append(_Pinned(size))
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer = self._buffers[self._turn]
        buffer.copied.synchronize()
        if buffer.host.numel() < size:
            buffer = self._buffers[self._turn] = _Pinned(2 * size)
        return buffer


class _Pinned:
    """Page-locked memory, and the moment from which it may be written again."""

    def __init__(self, size: int) -> None:
        self.host = torch.empty(max(size, 4096), dtype=torch.int32, pin_memory=True)
        self.copied = torch.cuda.Event(blocking=True)
