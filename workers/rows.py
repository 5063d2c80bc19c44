"""The tables of running requests, indexed by row, and the batch that a step makes of them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from eagleray.workers.context import AttentionMetadata
from eagleray.workers.wire import RowStart, Step

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass, row after row, and which of them are sampled."""

    input_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    metadata: AttentionMetadata
    rows: list[int]  # ascending
    starts: list[int]  # of each row: its first position in this batch
    query_start_loc: list[int]  # of each row: its first token in this batch; one more at the end
    sampled_rows: list[int]  # rows that reach their last known token
    sampled_tokens: Tensor  # [sampled rows] int64, where in the batch those tokens stand


class Rows:
    """What a rank remembers of running requests between steps.

    Lengths are known to the host without looking at any token, so they live there; tokens live on the device, where a
    sampled one is written and, in the next step, read.
    """

    def __init__(self, *, max_rows: int, max_len: int, block_size: int, device: torch.device) -> None:
        self.tokens = torch.zeros(max_rows, max_len, dtype=torch.int32, device=device)
        self.num_prompt_tokens = np.zeros(max_rows, np.int64)
        self.num_tokens = np.zeros(max_rows, np.int64)  # prompt, committed, and sampled by steps before the next
        self._num_computed_tokens = np.zeros(max_rows, np.int64)
        self._block_table = np.zeros((max_rows, -(-max_len // block_size)), np.int32)
        self._num_blocks = np.zeros(max_rows, np.int64)
        self._live = np.zeros(max_rows, np.bool_)
        self._block_size = block_size
        self._device = device

    def apply(self, step: Step) -> Batch:
        """Bring the tables up to date with a step and gather its batch."""
        self._live[step.stop] = False
        for start in step.start:
            self._start(start)
        for row, block_ids in step.blocks.items():
            self._append_blocks(row, block_ids)
        return self._gather(step)

    def _start(self, start: RowStart) -> None:
        row = start.row
        token_ids = np.frombuffer(start.token_ids, np.int32)
        self.tokens[row, : len(token_ids)] = torch.from_numpy(token_ids.copy()).to(self._device)
        self.num_prompt_tokens[row] = start.num_prompt_tokens
        self.num_tokens[row] = len(token_ids)
        self._num_computed_tokens[row] = start.num_computed_tokens
        self._num_blocks[row] = 0
        self._live[row] = True
        self._append_blocks(row, start.block_ids)

    def _append_blocks(self, row: int, block_ids: list[int]) -> None:
        begin = self._num_blocks[row]
        self._num_blocks[row] = end = begin + len(block_ids)
        self._block_table[row, begin:end] = block_ids

    def _gather(self, step: Step) -> Batch:
        rows, lengths = self._slices(step)
        starts = self._num_computed_tokens[rows]
        ends = starts + lengths
        query_start_loc = np.concatenate(([0], np.cumsum(lengths)))
        row_of_token = np.repeat(rows, lengths)
        positions = np.arange(query_start_loc[-1]) + np.repeat(starts - query_start_loc[:-1], lengths)
        blocks = self._block_table[row_of_token, positions // self._block_size]
        samples = ends == self.num_tokens[rows]
        self._num_computed_tokens[rows] = ends
        device_positions = self._to_device(positions)
        return Batch(
            input_ids=self.tokens[self._to_device(row_of_token), device_positions].long(),
            positions=device_positions,
            metadata=AttentionMetadata(
                query_start_loc=self._to_device(query_start_loc.astype(np.int32)),
                seq_lens=self._to_device(ends.astype(np.int32)),
                slot_mapping=self._to_device(blocks * np.int64(self._block_size) + positions % self._block_size),
                block_table=self._to_device(self._block_table[rows, : -(-int(ends.max()) // self._block_size)]),
                max_query_len=int(lengths.max()),
                max_seq_len=int(ends.max()),
            ),
            rows=rows.tolist(),
            starts=starts.tolist(),
            query_start_loc=query_start_loc.tolist(),
            sampled_rows=rows[samples].tolist(),
            sampled_tokens=self._to_device(query_start_loc[1:][samples] - 1),
        )

    def _slices(self, step: Step) -> tuple[IntArray, IntArray]:
        """The rows of a step, ascending, and how many tokens each runs."""
        rows = np.flatnonzero(self._live)
        lengths = np.ones(len(self._live), np.int64)
        lengths[list(step.slices)] = list(step.slices.values())
        rows = rows[lengths[rows] > 0]
        return rows, lengths[rows]

    def append(self, rows: list[int], token_ids: Tensor) -> None:
        """Write sampled tokens [len(rows)] behind their rows' last ones."""
        index = self._to_device(np.asarray(rows)), self._to_device(self.num_tokens[rows])
        self.tokens[index] = token_ids.int()
        self.num_tokens[rows] += 1

    def _to_device(self, values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self._device)
