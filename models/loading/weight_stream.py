"""Streams weights from safetensors files to a GPU through pinned memory, with several threads.

Reading the next part overlaps with the last one's way to the device, and the device converts the dtype. Files are
mapped: of a tensor that is cut in any of its dimensions a thread copies a strided view in one go, without the
interpreter's lock.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import local

import numpy as np
import torch
from torch import Tensor

from eagleray.models.loading.mapped_file import Bytes, MappedFile
from eagleray.models.loading.parts import parts
from eagleray.parallel.platform import Accelerator, platform_of
from eagleray.parallel.weight_shard import WeightShard

NUM_THREADS = 4
BUFFER_BYTES = 16 << 20  # of page-locked memory, and no part is larger; each thread has two


class WeightStream:
    """Fills shards, in any order, until it is finished."""

    def __init__(
        self,
        device: torch.device,
        *,
        num_threads: int = NUM_THREADS,
        buffer_bytes: int = BUFFER_BYTES,
        on_bytes: Callable[[int], None] | None = None,
    ) -> None:
        """`on_bytes` hears of each part how many bytes of weights it was, from `finish` and in its thread."""
        self._device = device
        self._on_bytes = on_bytes
        self._buffer_bytes = buffer_bytes
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="weights")
        self._parts: list[Future[int]] = []
        self._own = local()  # of each thread: its lane
        self._lanes: list[_Lane] = []
        self._files: dict[Path, MappedFile] = {}

    def fill(self, shard: WeightShard, file: Path, name: str) -> None:
        """Have `shard` filled from tensor `name` in `file`, whose shape the caller has checked."""
        if file not in self._files:
            self._files[file] = MappedFile(file)
        source, dtype = self._files[file].region(name, shard.region)
        shard.check_dtype(dtype)
        for part in parts(source.shape[:-1], max(1, self._buffer_bytes // dtype.itemsize)):
            self._parts.append(self._threads.submit(self._copy, source[part], dtype, shard.target[part]))

    def _copy(self, source: Bytes, dtype: torch.dtype, target: Tensor) -> int:
        """Returns how many bytes of weights are filled, or on their way."""
        if not hasattr(self._own, "lane"):
            self._own.lane = _Lane(self._device)
            self._lanes.append(self._own.lane)
        self._own.lane.copy(source, dtype, target)
        return target.nbytes

    def finish(self) -> None:
        """Wait until all shards are there. Raises what a thread raised."""
        try:
            for part in self._parts:
                nbytes = part.result()
                if self._on_bytes is not None:
                    self._on_bytes(nbytes)
            for lane in self._lanes:
                lane.wait()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Stop reading and let go of the files."""
        self._threads.shutdown(cancel_futures=True)
        self._parts.clear()
        self._files.clear()


class _Lane:
    """One thread's way to the device: two buffers that take turns, and a stream of its own if the device has any."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._accelerator = accelerator = platform_of(device).accelerator
        self._stream: torch.Stream | None = None
        if accelerator is not None:
            accelerator.set_device(device)  # for this thread, which would otherwise touch the first GPU
            self._stream = accelerator.Stream(device)
            self._stream.wait_stream(accelerator.default_stream(device))  # where the weights were allocated
        self._buffers = [_Buffer(accelerator), _Buffer(accelerator)]

    def copy(self, source: Bytes, dtype: torch.dtype, target: Tensor) -> None:
        self._buffers.reverse()
        buffer = self._buffers[0]
        host = buffer.copy_in(source).view(dtype).view(target.shape)
        with nullcontext() if self._accelerator is None else self._accelerator.stream(self._stream):
            on_device = host if host.dtype == target.dtype else host.to(self._device, non_blocking=True)
            target.copy_(on_device, non_blocking=True)
            buffer.left(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _Buffer:
    """Memory, page-locked for an accelerator, and the moment from which it may be written again."""

    def __init__(self, accelerator: Accelerator | None) -> None:
        self._pinned = accelerator is not None
        self._host = torch.empty(0, dtype=torch.uint8)
        self._event = None if accelerator is None else accelerator.Event(blocking=True)

    def copy_in(self, source: Bytes) -> Tensor:
        """A copy of `source` in this buffer, once what it held has left."""
        if self._event is not None:
            self._event.synchronize()
        if self._host.numel() < source.size:
            self._host = torch.empty(source.size, dtype=torch.uint8, pin_memory=self._pinned)
        taken = self._host[: source.size]
        np.copyto(taken.numpy().reshape(source.shape), source)
        return taken

    def left(self, stream: torch.Stream | None) -> None:
        """What it holds is on its way on `stream`."""
        if self._event is not None:
            self._event.record(stream)
