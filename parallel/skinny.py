"""`y = x W^T` for the few rows of a decode, in Triton. Such a product takes as long as reading W does.

cuBLAS reads at full speed but starts anew for every product; here the launch overlaps with the kernel before
(`overlap.py`). On H200 this wins up to some tens of rows. Drawing the start of W into L2 meanwhile was tried: no gain.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.overlap import OVERLAP

MAX_ROWS = 32
MAX_ROWS_IF_WIDE = 64
WIDE = 16384  # columns


class _Tile(NamedTuple):
    columns: int  # of y, per program
    depth: int  # columns of W per iteration
    num_stages: int


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel multiplies `x` `[rows, k]` by `weight` `[columns, k]`, and is the faster way."""
    return (
        x.is_cuda
        and OVERLAP
        and x.dim() == 2
        and x.shape[0] <= (MAX_ROWS_IF_WIDE if weight.shape[0] >= WIDE else MAX_ROWS)
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[0] % 64 == 0
        and weight.shape[1] % 256 == 0
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x` `[rows, k]` times the transpose of `weight` `[columns, k]`, plus `bias` `[columns]`: in `out` if given."""
    rows, columns = x.shape[0], weight.shape[0]
    narrow = rows <= 16 and columns < 6144
    out = x.new_empty(rows, columns) if out is None else out
    return _launch(x, weight, bias, out, _Tile(32, 256, 6) if narrow else _Tile(64, 128, 6), gated=False)


def silu_gated(x: Tensor, weight: Tensor) -> Tensor:
    """`silu(x G^T) * x U^T`, where `weight` `[2 * columns, k]` is G above U."""
    rows, columns = x.shape[0], weight.shape[0] // 2
    narrow = rows <= 16 and columns < 6144
    return _launch(
        x, weight, None, x.new_empty(rows, columns), _Tile(32, 256, 4) if narrow else _Tile(64, 128, 4), gated=True
    )


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: _Tile, *, gated: bool) -> Tensor:
    rows, depth = x.shape
    columns = out.shape[1]
    assert out.is_contiguous()
    _linear_kernel[(columns // tile.columns,)](
        x, weight, bias, out, rows, columns, depth, x.stride(0),
        ROWS=max(16, triton.next_power_of_2(rows)), COLUMNS=tile.columns, DEPTH=tile.depth,
        HAS_BIAS=bias is not None, GATED=gated, PDL=OVERLAP,
        num_warps=4, num_stages=tile.num_stages, launch_pdl=OVERLAP,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # [rows, depth]
    weight,  # [columns, depth], or [2 * columns, depth] if GATED
    bias,  # [columns], only if HAS_BIAS
    out,  # [rows, columns]
    rows,
    columns,
    depth,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for `COLUMNS` columns of `out`, which is computed transposed: the tensor cores want many rows."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    gate = weight + column.to(tl.int64)[:, None] * depth
    up = gate + columns.to(tl.int64) * depth
    k, row = tl.arange(0, DEPTH), tl.arange(0, ROWS)
    inside = (row < rows)[None, :]
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    acc_up = tl.zeros([COLUMNS, ROWS], tl.float32)
    for start in range(0, depth, DEPTH):
        values = tl.load(x + row[None, :] * x_stride + (start + k)[:, None], mask=inside, other=0.0)
        acc = tl.dot(tl.load(gate + (start + k)[None, :], eviction_policy="evict_first"), values, acc)
        if GATED:
            acc_up = tl.dot(tl.load(up + (start + k)[None, :], eviction_policy="evict_first"), values, acc_up)
    if HAS_BIAS:
        acc += tl.load(bias + column).to(tl.float32)[:, None]
    result = acc.to(out.dtype.element_ty)
    if GATED:  # rounded where separate kernels round
        rounded = result.to(tl.float32)
        result = (rounded / (1.0 + tl.exp(-rounded))).to(out.dtype.element_ty) * acc_up.to(out.dtype.element_ty)
    tl.store(out + row[None, :] * columns + column[:, None], result, mask=inside)
