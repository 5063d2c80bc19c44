"""What follows a decode, all in one launch: tokens written to their rows, and the rows one token further; in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.overlap import OVERLAP

LINES_AT_ONCE = 32


@triton.jit(do_not_specialize=["num_lines", "spare"])
def _advance_kernel(
    pairs, rows, positions, token_ids, tokens, tokens_stride, num_computed, num_lines, spare,
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
    tl.store(token_ids + lines, token_id, mask=inside)
    tl.store(tokens + row * tokens_stride + ahead, token_id.to(tl.int32), mask=inside)
    tl.store(num_computed + row, ahead, mask=inside)


def advance(pairs: Tensor, rows: Tensor, positions: Tensor, tokens: Tensor, num_computed: Tensor, spare: int) -> Tensor:
    """The token ids [n] of `pairs` [n]; each is written to `tokens` [rows, length] int32, behind `positions` [n].

    `num_computed` [rows] of `rows` [n] counts that position too. Where the row is `spare`, both are as if the position
    were -1. All but `tokens` are int64. Nothing is asked of the host, so graphs may capture it.
    """
    token_ids, num_lines = torch.empty_like(pairs), len(pairs)
    _advance_kernel[(triton.cdiv(num_lines, LINES_AT_ONCE),)](
        pairs, rows, positions, token_ids, tokens, tokens.stride(0), num_computed, num_lines, spare, LINES_AT_ONCE,
        OVERLAP, num_warps=1, launch_pdl=OVERLAP,
    )  # fmt: skip
    return token_ids
