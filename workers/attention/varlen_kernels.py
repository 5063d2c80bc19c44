"""The Triton kernel of attention over chunks of any length (see `varlen.py`)."""

# Kernels are compiled by Triton, which has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.attention.decode_kernels import find_blocks, soft_capped

_SEARCHED = tl.constexpr(256)  # requests that are looked at together


@triton.jit
def find_request(query_start_loc, n, index, QUERIES: tl.constexpr):
    """Whose the block of queries number `index` is: `n` if it is of the padding, -1 if it comes before all requests.

    Request `i` owns the numbers from `query_start_loc[i] // QUERIES + i` on, so each has enough of them, and one to
    spare at most; nobody needs to know the lengths of the others.
    """
    begun = 0
    for first in range(0, n + 1, _SEARCHED):
        request = first + tl.arange(0, _SEARCHED)
        start = tl.load(query_start_loc + request, mask=request <= n, other=0)
        begun += tl.sum(((request <= n) & (start // QUERIES + request <= index)).to(tl.int32), 0)
    return begun - 1


@triton.jit
def attend_tiles(
    m, l, acc,  # noqa: E741
    query, position, keys, values, blocks, start, stop, end, unit, scale, cap, block_stride, slot_stride,
    HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Go on with the softmax over the tiles from `start` to `stop`; unless `MASKED`, every query sees all their keys.

    `m` are maxima in units of log2, `l` sums of weights, `acc` weighted values `[rows, HEAD_PAD]`.
    """
    dim, lane = tl.arange(0, HEAD_PAD), tl.arange(0, TILE)
    # Blocks are looked up one tile ahead: as a chain of loads within one iteration they would cost a stage.
    next_block = find_blocks(blocks, start, end, BLOCK_SIZE, TILE)
    for tile in range(start, stop, TILE):
        key = tile + lane
        offset = (next_block * block_stride + key % BLOCK_SIZE * slot_stride)[:, None] + dim[None, :]
        next_block = find_blocks(blocks, tile + TILE, end, BLOCK_SIZE, TILE)
        if MASKED:
            k = tl.load(keys + offset, mask=(key < end)[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)
            v = tl.load(values + offset, mask=(key < end)[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0)
        elif HEAD_SIZE != HEAD_PAD:
            k = tl.load(keys + offset, mask=(dim < HEAD_SIZE)[None, :], other=0.0)
            v = tl.load(values + offset, mask=(dim < HEAD_SIZE)[None, :], other=0.0)
        else:
            k = tl.load(keys + offset)
            v = tl.load(values + offset)
        scores = tl.dot(query, tl.trans(k), input_precision="ieee")
        if HAS_CAP:
            scores = soft_capped(scores * scale, cap)
        if MASKED:
            seen = key[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (key[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        m_next = tl.maximum(m, tl.max(scores, 1) * unit)
        shift = m_next
        if MASKED and WINDOW > 0:  # a later query's window begins after the first tiles
            shift = tl.where(m_next == float("-inf"), 0.0, m_next)
        weights = tl.exp2(scores * unit - shift[:, None])
        old = tl.exp2(m - shift)
        l = l * old + tl.sum(weights, 1)  # noqa: E741
        acc = tl.dot(weights.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
        m = m_next
    return m, l, acc


@triton.jit(do_not_specialize=["query_start_loc", "seq_lens", "table", "n", "num_tokens", "table_stride"])
def varlen_attend_kernel(
    q,  # [num_tokens, KV_HEADS * GROUP, HEAD_SIZE]
    k_cache,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE], as v_cache
    v_cache,
    query_start_loc,  # [n + 1] int32
    seq_lens,  # [n] int32
    table,  # [n, max_blocks] int32
    sinks,  # [heads] float32, only if HAS_SINKS
    out,  # like q, contiguous
    n,
    num_tokens,
    scale,  # times log2(e)
    cap,  # times log2(e)
    q_stride,
    q_head_stride,
    table_stride,
    block_stride,
    slot_stride,
    head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program for a block of one request's queries and one KV head: a row for each query and head.

    Programs start in order of their numbers. The last blocks of a request have the most keys, so they come first.
    What differs from batch to batch, addresses within a larger tensor too, must not be compiled in.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    QUERIES: tl.constexpr = ROWS // GROUP
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    index, kv_head = number // KV_HEADS, number % KV_HEADS
    request = find_request(query_start_loc, n, index, QUERIES)
    if request < 0:
        return
    start = tl.load(query_start_loc + request)
    stop = tl.load(query_start_loc + request + 1, mask=request < n, other=num_tokens)
    first_query = (index - start // QUERIES - request) * QUERIES  # counted within the chunk
    num_queries = tl.minimum(stop - start - first_query, QUERIES)
    if num_queries <= 0:
        return

    row, dim = tl.arange(0, ROWS), tl.arange(0, HEAD_PAD)
    head = kv_head * GROUP + row % GROUP
    token = (start + first_query + row // GROUP).to(tl.int64)
    own = (row < num_queries * GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    place = out + (token * (KV_HEADS * GROUP) + head)[:, None] * HEAD_SIZE + dim[None, :]
    if request == n:  # padding
        tl.store(place, tl.zeros([ROWS, HEAD_PAD], out.dtype.element_ty), mask=own)
        return

    query = tl.load(q + (token * q_stride + head * q_head_stride)[:, None] + dim[None, :], mask=own, other=0.0)
    first = tl.load(seq_lens + request) - (stop - start) + first_query  # position of the first query
    position = first + row // GROUP
    end = first + num_queries  # of the keys that any of them sees
    blocks = table + request.to(tl.int64) * table_stride
    keys, values = k_cache + kv_head * head_stride, v_cache + kv_head * head_stride
    unit = scale  # what scores are multiplied with, if a cap has not done so
    if HAS_CAP:
        unit = 1.0
    m = tl.full([ROWS], float("-inf"), tl.float32)
    l = tl.zeros([ROWS], tl.float32)  # noqa: E741
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)

    seen_by_all = 0  # from this tile on, up to the diagonal
    if WINDOW > 0:
        lowest = tl.maximum(first - WINDOW + 1, 0) // TILE * TILE
        seen_by_all = (tl.maximum(end - WINDOW, 0) + TILE - 1) // TILE * TILE
        m, l, acc = attend_tiles(  # noqa: E741
            m, l, acc, query, position, keys, values, blocks, lowest, tl.minimum(seen_by_all, end), end,
            unit, scale, cap, block_stride, slot_stride,
            HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, WINDOW, HAS_CAP, True,
        )  # fmt: skip
    diagonal = (first + 1) // TILE * TILE
    m, l, acc = attend_tiles(  # noqa: E741
        m, l, acc, query, position, keys, values, blocks, seen_by_all, diagonal, end,
        unit, scale, cap, block_stride, slot_stride,
        HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, WINDOW, HAS_CAP, False,
    )  # fmt: skip
    m, l, acc = attend_tiles(  # noqa: E741
        m, l, acc, query, position, keys, values, blocks, tl.maximum(seen_by_all, diagonal), end, end,
        unit, scale, cap, block_stride, slot_stride,
        HEAD_SIZE, HEAD_PAD, BLOCK_SIZE, TILE, WINDOW, HAS_CAP, True,
    )  # fmt: skip
    if HAS_SINKS:
        l += tl.exp2(tl.load(sinks + head) * 1.4426950408889634 - m)  # noqa: E741
    tl.store(place, (acc / l[:, None]).to(out.dtype.element_ty), mask=own)
