"""Triton kernel for `y = x W^T` with one row, as in the decode of one request. W goes through registers.

W does not depend on the kernel before, so a program asks for its first tile of W while that one still runs
(`platform.py`), and many small programs keep more of W under way than a few that fill shared memory: the memory is
hardly ever idle between products. On an H200 a layer's products of an 8B model read 4.4 TB/s, where the kernel for
several rows reads 3.9.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.platform import LAUNCH, OVERLAP

NUM_WARPS = 4
SHALLOW = 4096


def tile_of(columns: int, depth: int, *, gated: bool) -> tuple[int, int]:
    """Columns and depth of the part of W that a program holds at once, the fastest on an H200.

    Programs that hold little keep the memory busiest, but where each runs long it is better that they hold more.
    """
    num_elements, most = (4096, 2048) if depth <= SHALLOW else (16384, 4096)
    tile_depth = min(depth & -depth, most)
    return min(num_elements // tile_depth // (2 if gated else 1), columns & -columns), tile_depth


@triton.jit
def silu_mul(gate, up):
    """`silu(gate) * up`, rounded where separate kernels round."""
    wide = gate.to(tl.float32)
    return (wide / (1.0 + tl.exp(-wide))).to(gate.dtype) * up


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool) -> None:
    """Write to `out` `[1, columns]` what `skinny.linear`, or `skinny.silu_gated` if `gated`, says of one row."""
    depth, columns = x.shape[1], out.shape[1]
    tile_columns, tile_depth = tile_of(columns, depth, gated=gated)
    _linear_row_kernel[(columns // tile_columns,)](
        x, weight, bias, out, columns, depth, COLUMNS=tile_columns, DEPTH=tile_depth, CHUNKS=depth // tile_depth,
        HAS_BIAS=bias is not None, GATED=gated, PDL=OVERLAP, num_warps=NUM_WARPS, **LAUNCH,
    )  # fmt: skip


@triton.jit
def _linear_row_kernel(
    x,  # [depth]
    weight,  # [columns, depth], or [2 * columns, depth] if GATED
    bias,  # [columns], only if HAS_BIAS
    out,  # [columns]
    columns,
    depth,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GATED: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for `COLUMNS` columns of `out`."""
    if PDL:
        gdc_launch_dependents()
    column, k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    gate = weight + column.to(tl.int64)[:, None] * depth + k[None, :]
    up = gate + columns.to(tl.int64) * depth
    gates = tl.load(gate, eviction_policy="evict_first")
    ups = gates
    if GATED:
        ups = tl.load(up, eviction_policy="evict_first")
    if PDL:
        gdc_wait()
    acc = tl.zeros([COLUMNS, DEPTH], tl.float32)
    acc_up = tl.zeros([COLUMNS, DEPTH], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        values = tl.load(x + chunk * DEPTH + k).to(tl.float32)[None, :]
        next_gates, next_ups = gates, ups
        if chunk + 1 < CHUNKS:
            next_gates = tl.load(gate + (chunk + 1) * DEPTH, eviction_policy="evict_first")
            if GATED:
                next_ups = tl.load(up + (chunk + 1) * DEPTH, eviction_policy="evict_first")
        acc += gates.to(tl.float32) * values
        if GATED:
            acc_up += ups.to(tl.float32) * values
        gates, ups = next_gates, next_ups
    total = tl.sum(acc, 1)
    if HAS_BIAS:
        total += tl.load(bias + column).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    if GATED:
        result = silu_mul(result, tl.sum(acc_up, 1).to(out.dtype.element_ty))
    tl.store(out + column, result)
