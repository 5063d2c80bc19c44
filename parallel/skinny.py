"""Triton kernel for `y = x W^T` with few rows, as in a decode. Such a product takes as long as reading W does.

cuBLAS reads at full speed but starts anew for every product; here the launch overlaps with the kernel before
(`platform.py`). On H200 this wins up to 64 rows; a single row has a kernel of its own (`single_row.py`). Two things
were tried meanwhile: drawing the start of W into L2 gains nothing, and loading its first tiles into registers breaks
the pipeline and costs 3 %.

Where columns are too few to occupy the GPU, the sum is split, too. Each program leaves its part in a workspace; the one
that comes last adds them up, in order, so the result does not depend on who that is.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel import single_row
from eagleray.parallel.platform import HOPPER, LAUNCH, OVERLAP, platform_of, processors
from eagleray.parallel.single_row import silu_mul

MAX_ROWS = 64
WIDE = 16384  # columns
FEW_PROGRAMS, MANY_PROGRAMS = 80, 132  # with fewer the sum is split, into no more than these: one for each processor
MAX_SPLITS, LEAST_DEPTH = 4, 512


class _Tile(NamedTuple):
    columns: int  # of y, per program
    depth: int  # columns of W per iteration
    num_stages: int


def is_fast_on(device: torch.device) -> bool:
    """Whether the kernel is the faster way on `device`, for what it takes."""
    return platform_of(device).compiles_kernels and OVERLAP and processors(device).shared_memory >= HOPPER


def takes(x: Tensor, weight: Tensor, *, gated: bool = False) -> bool:
    """Whether the kernel multiplies `x` `[rows, k]` by `weight` `[columns, k]`, or does `silu_gated` if `gated`."""
    return (
        x.dim() == 2
        and x.shape[0] <= MAX_ROWS
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[0] % (128 if gated else 64) == 0
        and weight.shape[1] % 256 == 0
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x` `[rows, k]` times the transpose of `weight` `[columns, k]`, plus `bias` `[columns]`: in `out` if given."""
    out = x.new_empty(x.shape[0], weight.shape[0]) if out is None else out
    return _launch(x, weight, bias, out, gated=False)


def silu_gated(x: Tensor, weight: Tensor) -> Tensor:
    """`silu(x G^T) * x U^T`, where `weight` `[2 * columns, k]` is G above U."""
    return _launch(x, weight, None, x.new_empty(x.shape[0], weight.shape[0] // 2), gated=True)


def tile_of(rows: int, columns: int, *, gated: bool) -> _Tile:
    """The fastest on an H200. A stage less costs up to a tenth, and one more gains nothing."""
    if rows <= 16 and columns < 6144:
        return _Tile(32, 256, 4 if gated else 6)
    if gated:
        return _Tile(64, 128, 4)
    wide = rows > 16 and columns >= WIDE and columns % 128 == 0
    return _Tile(128, 128, 4) if wide else _Tile(64, 128, 6)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, *, gated: bool) -> Tensor:
    rows, depth = x.shape
    columns = out.shape[1]
    assert out.is_contiguous()
    if rows == 1:
        single_row.multiply(x, weight, bias, out, gated=gated)
        return out
    tile = tile_of(rows, columns, gated=gated)
    row_pad, splits = max(16, triton.next_power_of_2(rows)), _num_splits(columns // tile.columns, depth, tile.depth)
    parts, arrived = _workspace(x.device)
    _linear_kernel[(columns // tile.columns, splits)](
        x, weight, bias, out, parts, arrived, rows, columns, depth, x.stride(0),
        ROWS=row_pad, COLUMNS=tile.columns, DEPTH=tile.depth, SPLITS=splits,
        HAS_BIAS=bias is not None, GATED=gated, PDL=OVERLAP,
        num_warps=4, num_stages=tile.num_stages, **LAUNCH,
    )  # fmt: skip
    return out


def _num_splits(programs: int, depth: int, tile_depth: int) -> int:
    """In how many parts the sum over `depth` is cut."""
    splits = 1
    while (
        programs <= FEW_PROGRAMS
        and splits < MAX_SPLITS
        and 2 * splits * programs <= MANY_PROGRAMS
        and depth // (2 * splits) >= LEAST_DEPTH
        and depth % (2 * splits * tile_depth) == 0
    ):
        splits *= 2
    return splits


_workspaces: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Room for the parts of a split sum, `[MANY_PROGRAMS, 2 (gate, up), 64 columns, 64 rows]`, and a count per tile.

    Launches on one stream take turns. It is made on first use, and lives as long as the process.
    """
    if device not in _workspaces:
        parts = torch.empty(MANY_PROGRAMS * 2 * 64 * MAX_ROWS, dtype=torch.float32, device=device)
        _workspaces[device] = parts, torch.zeros(FEW_PROGRAMS, dtype=torch.int32, device=device)
    return _workspaces[device]


@triton.jit
def _all_parts(part, parts, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPLITS: tl.constexpr):
    """The sum `[COLUMNS, ROWS]` of the parts of all splits, which lie `part` numbers apart."""
    place = tl.arange(0, COLUMNS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]
    total = tl.load(parts + place)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(parts + split * part + place)
    return total


@triton.jit(do_not_specialize=["rows"])
def _linear_kernel(
    x,  # [rows, depth]
    weight,  # [columns, depth], or [2 * columns, depth] if GATED
    bias,  # [columns], only if HAS_BIAS
    out,  # [rows, columns]
    parts,  # [programs, 1 or 2, COLUMNS, ROWS] float32, if SPLITS > 1
    arrived,  # [tiles of columns] int32, 0 between launches
    rows,
    columns,
    depth,
    x_stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLITS: tl.constexpr,
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
    each = depth // SPLITS
    for start in range(tl.program_id(1) * each, (tl.program_id(1) + 1) * each, DEPTH):
        values = tl.load(x + row[None, :] * x_stride + (start + k)[:, None], mask=inside, other=0.0)
        acc = tl.dot(tl.load(gate + (start + k)[None, :], eviction_policy="evict_first"), values, acc)
        if GATED:
            acc_up = tl.dot(tl.load(up + (start + k)[None, :], eviction_policy="evict_first"), values, acc_up)
    is_last = True
    if SPLITS > 1:
        part = COLUMNS * ROWS * (2 if GATED else 1)
        parts += tl.program_id(0) * SPLITS * part
        place = tl.arange(0, COLUMNS)[:, None] * ROWS + row[None, :]
        tl.store(parts + tl.program_id(1) * part + place, acc)
        if GATED:
            tl.store(parts + tl.program_id(1) * part + COLUMNS * ROWS + place, acc_up)
        tl.debug_barrier()  # all of this program's part is written before it is counted
        is_last = tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.store(arrived + tl.program_id(0), 0)
            acc = _all_parts(part, parts, COLUMNS, ROWS, SPLITS)
            if GATED:
                acc_up = _all_parts(part, parts + COLUMNS * ROWS, COLUMNS, ROWS, SPLITS)
        if HAS_BIAS:
            acc += tl.load(bias + column).to(tl.float32)[:, None]
        result = acc.to(out.dtype.element_ty)
        if GATED:
            result = silu_mul(result, acc_up.to(out.dtype.element_ty))
        tl.store(out + row[None, :] * columns + column[:, None], result, mask=inside)
