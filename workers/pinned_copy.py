"""Copies host values to the device through pinned memory, without blocking the host."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from eagleray.parallel.platform import platform_of
from eagleray.workers.arrays import IntArray


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Host `values` on the device. If that is the host, they are there already."""
    if platform_of(device).accelerator is None:
        return values
    return values.pin_memory().to(device, non_blocking=True)


class PinnedCopy:
    """Packs arrays into one page-locked tensor and copies them at once. On the host there is nothing to copy.

    torch's allocator gives page-locked memory out again only after the copies from it are done, so nobody needs to keep
    the tensor until then, and nobody waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_host = platform_of(device).accelerator is None

    def send(self, arrays: Sequence[IntArray]) -> list[Tensor]:
        """The arrays as int32 tensors on the device. Values must fit."""
        if self._on_host:
            return [torch.from_numpy(array.astype(np.int32)) for array in arrays]
        ends = np.cumsum([array.size for array in arrays])
        packed = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=True)
        host = packed.numpy()
        for array, end in zip(arrays, ends.tolist(), strict=True):
            host[end - array.size : end] = array
        on_device = packed.to(self._device, non_blocking=True)
        return list(on_device.split([array.size for array in arrays]))
