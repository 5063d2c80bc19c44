"""Streams weights from safetensors files to a GPU through pinned memory, with several threads.

Reading the next part overlaps with the last one's way to the device, and the device converts the dtype. Files are
mapped: of a tensor that is cut by columns a thread copies a strided view in one go, without the interpreter's lock.
"""

import json
import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from threading import local
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eagleray.parallel.weight_shard import WeightShard

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NUM_THREADS = 4
BUFFER_BYTES = 16 << 20  # of page-locked memory; each thread has two

Bytes = npt.NDArray[np.uint8]


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
        self._files: dict[Path, _MappedFile] = {}

    def fill(self, shard: WeightShard, file: Path, name: str) -> None:
        """Have `shard` filled from tensor `name` in `file`, whose shape the caller has checked."""
        if file not in self._files:
            self._files[file] = _MappedFile(file)
        source, dtype = self._files[file].region(name, shard.region)  # [rows, bytes of a row's own columns]
        target = shard.target.view(len(source), -1)
        rows = max(1, self._buffer_bytes // max(1, source.shape[1]))
        for start in range(0, len(source), rows):
            part = slice(start, start + rows)
            self._parts.append(self._threads.submit(self._copy, source[part], dtype, target[part]))

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
    """One thread's way to the device: two buffers that take turns, and a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # for this thread, which would otherwise touch the first GPU
            self._stream = torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.default_stream(device))  # where the weights were allocated
        self._buffers = [_Buffer(device), _Buffer(device)]

    def copy(self, source: Bytes, dtype: torch.dtype, target: Tensor) -> None:
        self._buffers.reverse()
        buffer = self._buffers[0]
        host = buffer.take(source).view(dtype).view(target.shape)
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            on_device = host if host.dtype == target.dtype else host.to(self._device, non_blocking=True)
            target.copy_(on_device, non_blocking=True)
            buffer.left(self._stream)

    def wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


class _Buffer:
    """Page-locked memory, and the moment from which it may be written again."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._host = torch.empty(0, dtype=torch.uint8)
        self._event = torch.cuda.Event(blocking=True) if self._pinned else None

    def take(self, source: Bytes) -> Tensor:
        """A copy of `source` in this buffer, once what it held has left."""
        if self._event is not None:
            self._event.synchronize()
        if self._host.numel() < source.size:
            self._host = torch.empty(source.size, dtype=torch.uint8, pin_memory=self._pinned)
        taken = self._host[: source.size]
        np.copyto(taken.numpy().reshape(source.shape), source)
        return taken

    def left(self, stream: torch.cuda.Stream | None) -> None:
        """What it holds is on its way on `stream`."""
        if self._event is not None:
            self._event.record(stream)


class _Extent(NamedTuple):
    """Where a tensor stands in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int


class _MappedFile:
    """The bytes of a safetensors file that was found to be whole."""

    def __init__(self, file: Path) -> None:
        self._file = file
        with file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ)
        self._bytes: Bytes = np.frombuffer(self._map, np.uint8)
        data = 8 + int.from_bytes(self._map[:8], "little")
        self._tensors = json.loads(self._map[8:data])
        self._data = data

    def region(self, name: str, region: tuple[slice, ...]) -> tuple[Bytes, torch.dtype]:
        """A region of a tensor of one or two dimensions, as rows of bytes, and its dtype."""
        extent = self._extent(name)
        size = extent.dtype.itemsize
        whole = self._bytes[extent.begin : extent.begin + prod(extent.shape) * size]
        rows, *columns = region
        if not columns:
            return whole[rows.start * size : rows.stop * size].reshape(1, -1), extent.dtype
        cut = slice(columns[0].start * size, columns[0].stop * size)
        return whole.reshape(extent.shape[0], -1)[rows, cut], extent.dtype

    def _extent(self, name: str) -> _Extent:
        entry = self._tensors[name]
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"has dtype {entry['dtype']}, but weights are of {', '.join(DTYPES)}, not quantized")
        return _Extent(DTYPES[entry["dtype"]], tuple(entry["shape"]), self._data + entry["data_offsets"][0])
