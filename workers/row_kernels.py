"""Triton kernels at both ends of a decode: rows to a batch, and rows advanced by one token."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.platform import LAUNCH, OVERLAP

LINES_AT_ONCE = 32
COLUMNS_AT_ONCE = 256


@triton.jit
def _gather_kernel(
    rows, tokens, tokens_stride, num_computed, table, max_blocks,
    input_ids, positions, slot_mapping, seq_lens, block_table, query_start_loc,
    BLOCK_SIZE: tl.constexpr, COLUMNS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for some columns of a line's block table. The first of them does all else that the line needs."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < max_blocks
    blocks = tl.load(table + row * max_blocks + columns, mask=inside, other=0)
    tl.store(block_table + line * max_blocks + columns, blocks, mask=inside)
    if tl.program_id(1) == 0:
        position = tl.load(num_computed + row)
        block = tl.load(table + row * max_blocks + position // BLOCK_SIZE).to(tl.int64)
        tl.store(input_ids + line, tl.load(tokens + row * tokens_stride + position).to(tl.int64))
        tl.store(positions + line, position)
        tl.store(slot_mapping + line, block * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(seq_lens + line, (position + 1).to(tl.int32))
        bounds = line + tl.arange(0, 2)  # the next line writes the second, too, and the same number
        tl.store(query_start_loc + bounds, bounds.to(tl.int32))


def gather_decodes(
    rows: Tensor, tokens: Tensor, num_computed: Tensor, table: Tensor, block_size: int, seq_lens: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One token of each of `rows` [n] int64, at the position that `num_computed` [rows] int64 says.

    Token ids, positions and slots [n] int64, lengths with that token [n] int32, block tables [n, max_blocks] int32 and
    `query_start_loc` [n + 1] int32; from `tokens` [rows, length] and `table` [rows, max_blocks], both int32 and
    contiguous. The lengths are in `seq_lens` if given. Nothing is asked of the host, so graphs may capture it.
    """
    assert tokens.is_contiguous()
    assert table.is_contiguous()
    n, max_blocks = len(rows), table.shape[1]
    gathered = (
        torch.empty_like(rows),
        torch.empty_like(rows),
        torch.empty_like(rows),
        table.new_empty(n) if seq_lens is None else seq_lens,
        table.new_empty(n, max_blocks),
        table.new_empty(n + 1),
    )
    _gather_kernel[(n, triton.cdiv(max_blocks, COLUMNS_AT_ONCE))](
        rows, tokens, tokens.stride(0), num_computed, table, max_blocks, *gathered,
        block_size, COLUMNS_AT_ONCE, OVERLAP, num_warps=1, **LAUNCH,
    )  # fmt: skip
    return gathered


@triton.jit(do_not_specialize=["num_lines", "spare"])
def _advance_kernel(
    pairs, rows, positions, tokens, tokens_stride, num_computed, num_lines, spare,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    lines = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lines < num_lines
    row = tl.load(rows + lines, mask=inside, other=0)
    ahead = tl.where(row == spare, 0, tl.load(positions + lines, mask=inside, other=0) + 1)
    token_id = 0xFFFFFFFF - (tl.load(pairs + lines, mask=inside, other=0) & 0xFFFFFFFF)
    tl.store(tokens + row * tokens_stride + ahead, token_id.to(tl.int32), mask=inside)
    tl.store(num_computed + row, ahead, mask=inside)


def advance(pairs: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, num_computed: Tensor, spare: int) -> None:
    """Write the token id of each of `pairs` [n] to `tokens` [rows, length] int32, behind `positions` [n].

    `num_computed` [rows] of `rows` [n] counts that position too. Where the row is `spare`, both are as if the position
    were -1. All but `tokens` are int64. Nothing is asked of the host, so graphs may capture it.
    """
    num_lines = len(pairs)
    _advance_kernel[(triton.cdiv(num_lines, LINES_AT_ONCE),)](
        pairs, rows, positions, tokens, tokens.stride(0), num_computed, num_lines, spare, LINES_AT_ONCE,
        OVERLAP, num_warps=1, **LAUNCH,
    )  # fmt: skip
