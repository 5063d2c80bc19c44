"""Mixed steps (chunks of any length) as CUDA graphs, one per number of tokens, up to where the GPU is slower than
Python.

A graph's shapes are fixed, so tokens and requests are padded. A padding token writes to a block that nobody reads; a
padding request has no tokens. Requests with one token go to the decode kernel, which takes as many requests as there
may be tokens; the others, of which there are few, to the backend for chunks.
"""

import bisect
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from eagleray.parallel.cuda_graphs import Replay
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.workers.attention.context import AttentionMetadata
from eagleray.workers.rows import Batch

if HAS_TRITON:
    from eagleray.workers.graphs.compile_ahead import compile_ahead

logger = logging.getLogger(__name__)

MAX_CHUNKS = 64  # of more than one token


def token_counts(max_num_batched_tokens: int) -> list[int]:
    """Sizes that graphs are made for; a step of more tokens keeps an H200 busy for longer than its launches take."""
    counts = {64, 128, *range(192, 1025, 64), *range(1152, 2049, 128)}
    return sorted(count for count in counts if count <= max_num_batched_tokens)


class MixedGraphs:
    """Replays the smallest graph that holds a batch. Where none are captured, a replay is a call."""

    def __init__(
        self,
        forward: Callable[[Batch], Tensor],
        counts: Sequence[int],
        *,
        max_requests: int,
        max_blocks: int,
        max_seq_len: int,
        spare_slot: int,
        device: torch.device,
    ) -> None:
        """Capture `forward`, tokens to hidden states, for every count, largest first."""
        begin = time.monotonic()
        self._counts = sorted(counts)
        self._spare_slot = spare_slot
        most, singles = self._counts[-1], min(self._counts[-1], max_requests)
        self._max_seq_len = max_seq_len

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._input_ids, self._positions = zeros(most, dtype=torch.int64), zeros(most, dtype=torch.int64)
        self._slots = torch.full((most,), spare_slot, dtype=torch.int64, device=device)
        self._seq_lens, self._block_table = zeros(singles), zeros(singles, max_blocks)
        self._rest_starts, self._rest_lens = zeros(MAX_CHUNKS + 1), zeros(MAX_CHUNKS)
        self._rest_table = zeros(MAX_CHUNKS, max_blocks)
        self._replays: dict[int, Replay[Tensor]] = {}
        self.num_bytes = 0  # of device memory that the graphs took
        graphs = platform_of(device).graphs
        if graphs is None:
            self._replays = {count: partial(forward, self._batch(count)) for count in self._counts}
            return
        forwards = {count: partial(forward, self._batch(count)) for count in reversed(self._counts)}
        num_compiled = compile_ahead(forwards.values(), device)
        pool, free = graphs.pool(), graphs.free_bytes(device)
        for count, run in forwards.items():
            self._replays[count] = graphs.capture(run, pool)
        self.num_bytes = free - graphs.free_bytes(device)
        logger.info(
            "captured %d graphs of mixed steps and compiled %d kernels in %.1f s",
            len(self._counts), num_compiled, time.monotonic() - begin,
        )  # fmt: skip

    def _batch(self, count: int) -> Batch:
        """The static tensors, as a batch of `count` tokens."""
        singles = min(count, len(self._seq_lens))
        rest = AttentionMetadata(
            query_start_loc=self._rest_starts,
            seq_lens=self._rest_lens,
            slot_mapping=self._slots[:count],
            block_table=self._rest_table,
            max_query_len=count,
            max_seq_len=self._max_seq_len,
            is_padded=True,
        )
        whole = AttentionMetadata(
            query_start_loc=self._rest_starts,
            seq_lens=self._seq_lens[:singles],
            slot_mapping=self._slots[:count],
            block_table=self._block_table[:singles],
            max_query_len=count,
            max_seq_len=self._max_seq_len,
            is_padded=True,
            num_single=singles,
            rest=rest,
        )
        return Batch(self._input_ids[:count], self._positions[:count], whole)

    def holds(self, batch: Batch) -> bool:
        """Whether a graph holds such a batch."""
        metadata = batch.metadata
        num_chunks = len(metadata.seq_lens) - metadata.num_single
        return len(batch.input_ids) <= self._counts[-1] and num_chunks <= MAX_CHUNKS

    def replay(self, batch: Batch) -> Tensor:
        """Hidden states `[tokens, hidden_size]` of a batch. The next run overwrites them."""
        tokens, n = len(batch.input_ids), batch.metadata.num_single
        count = self._counts[bisect.bisect_left(self._counts, tokens)]
        self._input_ids[:tokens] = batch.input_ids
        self._positions[:tokens] = batch.positions
        self._slots[:tokens] = batch.metadata.slot_mapping
        self._slots[tokens:count] = self._spare_slot
        self._set_requests(batch.metadata, n)
        return self._replays[count]()[:tokens]

    def _set_requests(self, metadata: AttentionMetadata, n: int) -> None:
        """The first `n` have one token."""
        num_chunks, width = len(metadata.seq_lens) - n, metadata.block_table.shape[1]
        self._seq_lens[:n] = metadata.seq_lens[:n]
        self._seq_lens[n:] = 0
        self._block_table[:n, :width] = metadata.block_table[:n]
        self._rest_starts[: num_chunks + 1] = metadata.query_start_loc[n:]
        self._rest_starts[num_chunks + 1 :] = metadata.query_start_loc[-1]
        self._rest_lens[:num_chunks] = metadata.seq_lens[n:]
        self._rest_lens[num_chunks:] = 0
        self._rest_table[:num_chunks, :width] = metadata.block_table[n:]
