"""The tables of running requests, indexed by row, and the batch that a step makes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from eagleray.parallel.platform import HAS_TRITON
from eagleray.workers.arrays import BoolArray, IntArray
from eagleray.workers.attention.context import AttentionMetadata
from eagleray.workers.pinned_copy import PinnedCopy
from eagleray.workers.protocol.messages import RowStart, Step

if HAS_TRITON:
    from eagleray.workers import row_kernels


@dataclass(frozen=True, slots=True)
class Chunks:
    """Which rows a step runs, and how much of each; all on the host."""

    rows: IntArray  # those that run one token first, each kind in ascending order
    starts: IntArray  # first position of each
    ends: IntArray
    samples: BoolArray  # whether the row reaches its last known token
    is_decode: bool  # every row runs and samples one token, and none has just started
    drafts: Mapping[int, IntArray]  # by row, the tokens of a draft with which its chunk ends


@dataclass(frozen=True, slots=True)
class Lines:
    """The places at which a step draws tokens: the end of each chunk that samples, and the places of its draft."""

    rows: IntArray  # [n]
    num_tokens: IntArray  # [n], which come before
    tokens: IntArray | None  # [n], where the last of these lies among the batch's; None if these are all of the batch


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one forward pass, row after row."""

    input_ids: Tensor  # [tokens] int64
    positions: Tensor  # [tokens] int64
    metadata: AttentionMetadata


class Rows:
    """What a rank remembers of running requests between steps.

    Lengths are known to the host without looking at any token. Tokens live on the device, where a sampled one is
    written and, in the next step, read; lengths and block tables have a copy there, so that a batch of decodes needs
    nothing from the host. One spare row, with a block of its own, takes what padded batches write.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        max_len: int,
        block_size: int,
        spare_block: int,
        device: torch.device,
        on_new_blocks: Callable[[Tensor], None],
    ) -> None:
        """`on_new_blocks` hears of blocks [n] int32, on the device, that go to a row and hold nothing for it yet."""
        self.max_blocks = max_blocks = -(-max_len // block_size)
        self.spare_slot = spare_block * block_size
        self.spare = max_rows
        self.max_len = max_len
        self.tokens = torch.zeros(max_rows + 1, max_len, dtype=torch.int32, device=device)
        self.num_prompt_tokens = np.zeros(max_rows, np.int64)
        self.num_tokens = np.zeros(max_rows, np.int64)  # prompt, committed, and sampled by steps before the next
        self._num_computed_tokens = np.zeros(max_rows, np.int64)
        self._num_blocks = np.zeros(max_rows, np.int64)
        self._live = np.zeros(max_rows, np.bool_)
        self._block_table = torch.full((max_rows + 1, max_blocks), spare_block, dtype=torch.int32, device=device)
        self._device_num_computed = torch.zeros(max_rows + 1, dtype=torch.int64, device=device)
        self._block_size = block_size
        self._staging = PinnedCopy(device)
        self._on_new_blocks = on_new_blocks

    # ---- a step changes the tables

    def apply(self, step: Step) -> Chunks:
        """Bring the tables up to date with a step; what it runs counts as computed."""
        self._live[step.stop] = False
        for start in step.start:
            self._start(start)
        known = {start.row: start.num_computed_tokens // self._block_size for start in step.start}
        new_blocks = {start.row: start.block_ids for start in step.start} | step.blocks
        if new_blocks:
            self._append_blocks(new_blocks, known)
        if step.num_tokens:
            self._go_back(step.num_tokens)
        drafts = {row: np.frombuffer(drafted, np.int32).astype(np.int64) for row, drafted in step.drafts.items()}
        if drafts:
            self._append_drafts(drafts)
        return self._chunks(step, drafts)

    def _start(self, start: RowStart) -> None:
        row, token_ids = start.row, np.frombuffer(start.token_ids, np.int32)
        self.tokens[row, : len(token_ids)] = self._staging.send([token_ids.astype(np.int64)])[0]
        self.num_prompt_tokens[row] = start.num_prompt_tokens
        self.num_tokens[row] = len(token_ids)
        self._num_computed_tokens[row] = start.num_computed_tokens
        self._num_blocks[row] = 0
        self._live[row] = True

    def _append_blocks(self, new_blocks: dict[int, list[int]], known: dict[int, int]) -> None:
        """`known` says how many of a row's blocks hold what was computed before."""
        rows = np.repeat(list(new_blocks), [len(blocks) for blocks in new_blocks.values()])
        columns = np.concatenate([self._num_blocks[row] + np.arange(len(b)) for row, b in new_blocks.items()])
        blocks = np.concatenate([np.asarray(blocks, np.int64) for blocks in new_blocks.values()])
        for row, block_ids in new_blocks.items():
            self._num_blocks[row] += len(block_ids)
        fresh = np.concatenate([np.asarray(ids[known.get(row, 0) :], np.int64) for row, ids in new_blocks.items()])
        on_device = self._staging.send([rows, columns, blocks, fresh])
        self._block_table[on_device[0].long(), on_device[1].long()] = on_device[2]
        if len(fresh):
            self._on_new_blocks(on_device[3])

    def _go_back(self, num_tokens: dict[int, int]) -> None:
        """These rows have so many tokens, all but one of them computed."""
        rows, counts = np.array(list(num_tokens), np.int64), np.array(list(num_tokens.values()), np.int64)
        self.num_tokens[rows], self._num_computed_tokens[rows] = counts, counts - 1
        device_rows, computed = self._staging.send([rows, counts - 1])
        self._device_num_computed[device_rows.long()] = computed.long()

    def _append_drafts(self, drafts: Mapping[int, IntArray]) -> None:
        """Write them behind the rows' tokens, where they are not counted."""
        rows = np.repeat(list(drafts), [len(drafted) for drafted in drafts.values()])
        positions = np.concatenate([self.num_tokens[row] + np.arange(len(each)) for row, each in drafts.items()])
        device_rows, device_positions, ids = self._staging.send(
            [rows, positions, np.concatenate(list(drafts.values()))]
        )
        self.tokens[device_rows.long(), device_positions.long()] = ids

    def _chunks(self, step: Step, drafts: Mapping[int, IntArray]) -> Chunks:
        rows = np.flatnonzero(self._live)
        lengths = np.ones(len(self._live), np.int64)
        lengths[list(step.chunks)] = list(step.chunks.values())
        rows = rows[lengths[rows] > 0]
        rows = rows[np.argsort(lengths[rows] > 1, kind="stable")]
        starts = self._num_computed_tokens[rows]
        ends = starts + lengths[rows]
        self._num_computed_tokens[rows] = ends
        known = self.num_tokens[rows]
        if drafts:
            known += [len(drafts.get(row, ())) for row in rows.tolist()]
        samples = ends == known
        is_decode = not step.start and bool(samples.all()) and bool((ends - starts == 1).all())
        return Chunks(rows, starts, ends, samples, is_decode, drafts)

    def lines(self, chunks: Chunks) -> Lines:
        """Where a step with these chunks draws."""
        if chunks.is_decode:
            return Lines(chunks.rows, chunks.ends, None)
        rows, ends = chunks.rows[chunks.samples], chunks.ends[chunks.samples]
        lengths = chunks.ends - chunks.starts
        if not chunks.drafts and len(rows) == lengths.sum():
            return Lines(rows, ends, None)
        last = lengths.cumsum()[chunks.samples] - 1
        if chunks.drafts:
            counts = np.array([1 + len(chunks.drafts.get(row, ())) for row in rows.tolist()])
            behind = np.repeat(counts.cumsum(), counts) - np.arange(counts.sum()) - 1  # places between it and the end
            rows, ends, last = (np.repeat(each, counts) for each in (rows, ends, last))
            ends, last = ends - behind, last - behind
        return Lines(rows, ends, last)

    def count_sampled(self, rows: IntArray) -> None:
        """One more token of each of `rows` is known, on the device."""
        self.num_tokens[rows] += 1

    # ---- a batch of any chunks, put together on the host

    def gather(self, chunks: Chunks) -> Batch:
        """The batch that runs `chunks`."""
        rows, starts, ends = chunks.rows, chunks.starts, chunks.ends
        lengths = ends - starts
        query_start_loc = np.concatenate(([0], np.cumsum(lengths)))
        row_of_token = np.repeat(rows, lengths)
        positions = np.arange(query_start_loc[-1]) + np.repeat(starts - query_start_loc[:-1], lengths)
        num_single = int((lengths == 1).sum())
        token_rows, token_positions, query_starts, seq_lens, device_rows = self._staging.send(
            [row_of_token, positions, query_start_loc, ends, rows]
        )
        self._device_num_computed[device_rows.long()] = seq_lens.long()
        block_table = self._block_table[device_rows.long(), : -(-int(ends.max()) // self._block_size)]
        token_rows, token_positions = token_rows.long(), token_positions.long()
        token_blocks = self._block_table[token_rows, token_positions // self._block_size]
        whole = AttentionMetadata(
            query_start_loc=query_starts,
            seq_lens=seq_lens,
            slot_mapping=_slots(token_blocks, token_positions, self._block_size),
            block_table=block_table,
            max_query_len=int(lengths.max()),
            max_seq_len=int(ends.max()),
            num_single=num_single,
        )
        return Batch(
            input_ids=self.tokens[token_rows, token_positions].long(),
            positions=token_positions,
            metadata=_with_rest(whole) if 0 < num_single < len(rows) else whole,
        )

    def append(self, rows: IntArray, positions: IntArray, token_ids: Tensor) -> None:
        """Write `token_ids` [n] at `positions` [n] of `rows` [n]."""
        device_rows, device_positions = self.to_device(rows, positions)
        self.tokens[device_rows.long(), device_positions.long()] = token_ids.int()

    def to_device(self, *arrays: IntArray) -> list[Tensor]:
        """Numbers as int32 tensors on the device."""
        return self._staging.send(arrays)

    # ---- a batch of decodes, put together on the device

    def gather_decodes(self, rows: Tensor, seq_lens: Tensor | None = None) -> Batch:
        """One token of each of `rows` [n] int64 on the device, padded with the spare row, where kernels run.

        Lengths with that token are in `seq_lens` [n] int32 if given. Asks nothing of the host.
        """
        input_ids, positions, slot_mapping, seq_lens, block_table, query_start_loc = row_kernels.gather_decodes(
            rows, self.tokens, self._device_num_computed, self._block_table, self._block_size, seq_lens
        )
        return Batch(
            input_ids=input_ids,
            positions=positions,
            metadata=AttentionMetadata(
                query_start_loc=query_start_loc,
                seq_lens=seq_lens,
                slot_mapping=slot_mapping,
                block_table=block_table,
                max_query_len=1,
                max_seq_len=self.max_len,
            ),
        )

    def advance(self, rows: Tensor, positions: Tensor, pairs: Tensor) -> None:
        """The tokens at `positions` of `rows` [n] int64 are computed, and those of `pairs` [n] follow.

        The spare row stays where it is: it runs in many steps and must never reach the end of its tokens.
        """
        row_kernels.advance(pairs, rows, positions, self.tokens, self._device_num_computed, self.spare)


def _slots(blocks: Tensor, positions: Tensor, block_size: int) -> Tensor:
    return blocks.long() * block_size + positions % block_size


def _with_rest(whole: AttentionMetadata) -> AttentionMetadata:
    n = whole.num_single
    rest = replace(
        whole,
        query_start_loc=whole.query_start_loc[n:],
        seq_lens=whole.seq_lens[n:],
        block_table=whole.block_table[n:],
        num_single=0,
    )
    return replace(whole, rest=rest)
