"""Decode steps as CUDA graphs, one per batch size, from row numbers to the next tokens."""

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from eagleray.parallel.cuda_graphs import Replay
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.workers.arrays import IntArray
from eagleray.workers.rows import Rows

if HAS_TRITON:
    from eagleray.workers.graphs.compile_ahead import compile_ahead

logger = logging.getLogger(__name__)

DecodeForward = Callable[[int], None]  # decodes the first so many static rows


def batch_sizes(max_rows: int) -> list[int]:
    """Sizes that graphs are made for: dense where a step is short, so that padding costs little."""
    sizes = {1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_rows + 1, 32), max_rows}
    return sorted(size for size in sizes if size <= max_rows)


class DecodeGraphs:
    """Replays the smallest graph that holds a batch; the rest of it runs on the spare row.

    Where none are captured, a replay is a call.
    """

    def __init__(self, forward: DecodeForward, rows: Rows, static_rows: Tensor, sizes: Sequence[int]) -> None:
        """Capture every size, largest first, so that the smaller ones fit into its memory.

        `static_rows` [at least the largest] int64 on the device are what `forward` reads.
        """
        device = static_rows.device
        begin = time.monotonic()
        self._rows = rows
        self._sizes = sorted(sizes)
        self._static_rows = static_rows
        self._last: IntArray = np.empty(0, np.int64)
        self._replays: dict[int, Replay[None]] = {}
        self.num_bytes: dict[int, int] = {}  # of device memory that each took, by size
        graphs = platform_of(device).graphs
        if graphs is None:
            self._replays = {size: partial(forward, size) for size in self._sizes}
            return
        forwards = {size: partial(forward, size) for size in reversed(self._sizes)}
        num_compiled = compile_ahead(forwards.values(), device)
        pool, free = graphs.pool(), graphs.free_bytes(device)
        for size, run in forwards.items():
            self._replays[size] = graphs.capture(run, pool)
            before, free = free, graphs.free_bytes(device)
            self.num_bytes[size] = before - free
        logger.info(
            "captured %d decode graphs and compiled %d kernels in %.1f s",
            len(self._sizes), num_compiled, time.monotonic() - begin,
        )  # fmt: skip

    def holds(self, num_rows: int) -> bool:
        """Whether a graph holds so many rows."""
        return num_rows <= self._sizes[-1]

    def replay(self, rows: IntArray) -> int:
        """Decode `rows`; returns how many lines that are with those of the spare row behind them."""
        count = len(rows)
        size = self._sizes[bisect.bisect_left(self._sizes, count)]
        if not np.array_equal(rows, self._last):
            self._static_rows[:count] = self._rows.to_device(rows)[0]
            self._static_rows[count:] = self._rows.spare
            self._last = rows
        self._replays[size]()
        return size
