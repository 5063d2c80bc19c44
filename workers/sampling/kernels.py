"""Triton kernel that draws the next token of plain rows (greedy or random, no other options) in one pass over the
logits.

It reads this rank's logits once, in the model's precision, and leaves each line's best (value, id) pair as
`packed_pairs.py` packs it. The noise is that of `gumbel.py`: the same integers, and logarithms within a few
units in the last place.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.platform import LAUNCH, OVERLAP
from eagleray.workers.sampling import packed_pairs

LARGEST_TILE, SMALLEST_TILE = 1024, 128  # columns that a program reads at once
FEW_PROGRAMS = 100  # fewer leave most of the GPU idle
ENOUGH_PROGRAMS = 2048  # of four warps, that is about as many as the GPU runs at once

_LOW = tl.constexpr(0xFFFFFFFF)
_UNIT = tl.constexpr(2.0**-31 * (1 - 2.0**-24))
_LOWEST = tl.constexpr(-(1 << 31))
_NOT_FINITE = tl.constexpr(packed_pairs.NOT_FINITE)


@triton.jit
def row_key(seed, position):
    """`gumbel.row_keys`: 64 bits, unsigned, of a mixed seed and a position, both int64."""
    z = seed.to(tl.uint64, bitcast=True) + (position + 1).to(tl.uint64, bitcast=True) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def random_bits(key, token_ids):
    """`gumbel.random_bits`: 32 bits, unsigned, for each of `token_ids` int32."""
    x = token_ids.to(tl.uint32, bitcast=True) * (key | 1).to(tl.uint32) + (key >> 32).to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def log_exponential(bits):
    """`gumbel.log_exponential` of its random bits.

    log1p(-u) is log(w) * u / (1 - w) with w = 1 - u as it is rounded: where w has lost digits of u, so has the divisor
    (Kahan; Goldberg, "What every computer scientist should know about floating-point arithmetic", theorem 4).
    """
    u = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * _UNIT
    w = 1.0 - u
    exponential = tl.where(w == 1.0, u, u * (tl.log(w) / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.log(exponential)


@triton.jit
def tanh(x):
    """A series where the fraction would lose digits; within 1e-6 of the value."""
    t = tl.exp(-2.0 * tl.abs(x))
    far = tl.where(x < 0, t - 1.0, 1.0 - t) / (1.0 + t)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(x) < 0.1, near, far)


@triton.jit(do_not_specialize=["tiles", "first_id", "num_tokens"])
def _draw_kernel(
    logits, stride, rows, num_tokens, temperatures, seeds, best_pairs, first_id, shard, tiles, cap,
    HAS_CAP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, chunk) raises the line's pair to the best of `tiles` tiles of columns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0)
    row = tl.load(rows + line)
    temperature = tl.load(temperatures + row)
    key = row_key(tl.load(seeds + row), tl.load(num_tokens + line).to(tl.int64))
    logits += line.to(tl.int64) * stride
    first = tl.program_id(1) * tiles * TILE + tl.arange(0, TILE)
    # Each lane keeps its best. It takes a later column for a higher value only, so ties stay with the lower id.
    best = tl.full([TILE], _LOWEST, tl.int32)
    best_column = first
    for tile in range(tiles):
        columns = first + tile * TILE
        inside = columns < shard
        values = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
        finite = tl.abs(values) < float("inf")
        if HAS_CAP:
            values = tanh(values / cap) * cap
        if temperature > 0:
            values = tl.div_rn(values, temperature) - log_exponential(random_bits(key, first_id + columns))
        bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
        ordered = tl.where(finite, ((bits >> 31) & 0x7FFFFFFF) ^ bits, _NOT_FINITE)
        is_better = inside & (ordered > best)
        best = tl.where(is_better, ordered, best)
        best_column = tl.where(is_better, columns, best_column)
    # A lane beyond the shard has the lowest value and a higher id than lane 0, so it does not win.
    pairs = (best.to(tl.int64) << 32) + (_LOW - (first_id + best_column).to(tl.int64))
    tl.atomic_max(best_pairs + line, tl.max(pairs, axis=0), sem="relaxed")


def best_plain_pairs(
    logits: Tensor,
    rows: Tensor,
    num_tokens: Tensor,
    temperatures: Tensor,
    seeds: Tensor,
    first_id: int,
    soft_cap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The highest pair of each line of `logits` [n, shard], whose columns are tokens from `first_id` on: [n] int64, in
    `out` if given.

    Line i belongs to `rows[i]` of `temperatures` [rows] float32 and mixed `seeds` [rows] int64, and `num_tokens[i]` is
    the position that is drawn for. A temperature of 0 is greedy. With `soft_cap`, logits are first bent to
    `soft_cap * tanh(logit / soft_cap)`. A line with a logit that is not finite has the mark of `packed_pairs.py`.
    Nothing is asked of the host, so graphs may capture it.
    """
    num_lines, shard = logits.shape
    tile, tiles, chunks = _cut(num_lines, shard)
    pairs = torch.empty(num_lines, dtype=torch.int64, device=logits.device) if out is None else out
    pairs.fill_(packed_pairs.PAD)
    _draw_kernel[(num_lines, chunks)](
        logits,
        logits.stride(0),
        rows,
        num_tokens,
        temperatures,
        seeds,
        pairs,
        first_id,
        shard,
        tiles,
        1.0 if soft_cap is None else soft_cap,
        soft_cap is not None,
        tile,
        OVERLAP,
        num_warps=max(1, tile // 256),
        **LAUNCH,
    )
    return pairs


def _cut(num_lines: int, shard: int) -> tuple[int, int, int]:
    """Columns of a tile, tiles of a chunk, and chunks of a line."""
    tile = LARGEST_TILE
    while tile > SMALLEST_TILE and num_lines * triton.cdiv(shard, tile) < FEW_PROGRAMS:
        tile //= 2
    tiles_of_line = triton.cdiv(shard, tile)
    tiles = triton.cdiv(tiles_of_line, min(tiles_of_line, triton.cdiv(ENOUGH_PROGRAMS, num_lines)))
    return tile, tiles, triton.cdiv(tiles_of_line, tiles)
