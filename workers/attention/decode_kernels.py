"""Triton kernels of decode attention: the plan (`plan_kernel`), the attention itself, and the combination of its
splits.

How a request's keys are cut, and why its result does not depend on the batch: see `decode.py`. Plan and block table are
read before the kernels that run meanwhile have ended, which `plan_decode` makes safe.
"""

# Kernels are compiled by Triton, which has no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIELDS = tl.constexpr(8)  # int32 per split of work, of which 5 are used: one sector of memory
CHUNKS = tl.constexpr(8)  # per section
MAX_SECTIONS = tl.constexpr(16)  # per request


@triton.jit(do_not_specialize=["seq_lens", "rows", "n"])
def plan_kernel(
    seq_lens,  # [n] int32
    rows,  # [n] int64, only if HAS_ROWS
    splits,  # [1] int32: how many splits of work there are
    requests,  # [n, 4] int32: first split, splits, in how many each section is cut, keys of the longest split
    work,  # [splits, FIELDS] int32: 2 * request (+ 1 if it is one split), row, first key, end, keys per chunk
    n,
    lanes,
    worth_cutting,
    HAS_ROWS: tl.constexpr,
    WINDOW: tl.constexpr,  # 0: none
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    SHORT_CHUNKS: tl.constexpr,
    N_PAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program. A section is one split, or cut in chunks where it is more than its share of all the work.

    Long splits come first: short ones fill the gaps at the end.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    request = tl.arange(0, N_PAD)
    seq_len = tl.load(seq_lens + request, mask=request < n, other=0)
    lowest = tl.zeros_like(seq_len)
    if WINDOW > 0:
        lowest = tl.maximum(seq_len - WINDOW, 0)
    origin = lowest // TILE * TILE
    span = seq_len - origin
    sections = tl.minimum((span + SECTION - 1) // SECTION, MAX_SECTIONS)
    least: tl.constexpr = CHUNKS * TILE
    even = ((span + sections - 1) // tl.maximum(sections, 1) + least - 1) // least * least
    section = tl.maximum(even, least) if SHORT_CHUNKS else tl.where(sections > 1, even, SECTION)
    is_long = tl.minimum(section, span).to(tl.int64) * lanes > tl.sum(span, 0)
    ratio = tl.where(is_long & (span > worth_cutting), CHUNKS, 1)
    size = section // ratio
    count = (span + size - 1) // size
    longest = tl.minimum(size, span)
    tl.store(requests + request * 4 + 1, count, mask=request < n)
    tl.store(requests + request * 4 + 2, ratio, mask=request < n)
    tl.store(requests + request * 4 + 3, longest, mask=request < n)
    tl.debug_barrier()
    start = tl.zeros_like(count)
    for first in range(0, n, 32):
        other = first + tl.arange(0, 32)
        other_count = tl.load(requests + other * 4 + 1, mask=other < n, other=0)
        other_longest = tl.load(requests + other * 4 + 3, mask=other < n, other=0)
        is_before = (other_longest[None, :] > longest[:, None]) | (
            (other_longest[None, :] == longest[:, None]) & (other[None, :] < request[:, None])
        )
        start += tl.sum(tl.where(is_before, other_count[None, :], 0), 1)
    tl.store(requests + request * 4, start, mask=request < n)
    tl.store(splits, tl.sum(count, 0))
    row = request.to(tl.int64)
    if HAS_ROWS:
        row = tl.load(rows + request, mask=request < n, other=0)
    for j in range(tl.max(count, 0)):
        field = work + (start + j).to(tl.int64) * FIELDS
        mine = j < count
        tl.store(field, request * 2 + (count == 1).to(tl.int32), mask=mine)
        tl.store(field + 1, row.to(tl.int32), mask=mine)
        tl.store(field + 2, tl.maximum(lowest, origin + j * size), mask=mine)
        tl.store(field + 3, tl.minimum(seq_len, origin + (j + 1) * size), mask=mine)
        tl.store(field + 4, section // CHUNKS, mask=mine)


@triton.jit
def merge(m, l, acc, m_next, l_next, acc_next):  # noqa: E741
    """Two parts of a softmax as one: maxima in units of log2, sums of weights, weighted values (rows by columns).

    Every operation is exact when one part is empty (-inf, 0, 0). The fused multiply-add is spelled out, so that every
    kernel rounds in the same places.
    """
    m_both = tl.maximum(m, m_next)
    shift = tl.where(m_both == float("-inf"), 0.0, m_both)
    old, new = tl.exp2(m - shift), tl.exp2(m_next - shift)
    acc = tl.fma(acc, tl.broadcast_to(old[:, None], acc.shape), acc_next * new[:, None])
    return m_both, tl.fma(l, old, l_next * new), acc


@triton.jit
def soft_capped(scores, cap):
    """`cap * tanh(scores / cap)`, everything in units of log2."""
    return cap - 2.0 * cap / (tl.exp2(scores * (2.0 * 1.4426950408889634 / cap)) + 1.0)


@triton.jit
def find_blocks(blocks, tile, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """The block of each of `TILE` keys from `tile` on, one number if they share it. Beyond `end`: the last one."""
    if TILE <= BLOCK_SIZE:
        block = tl.load(blocks + tl.minimum(tile, end - 1) // BLOCK_SIZE)
    else:
        block = tl.load(blocks + tl.minimum(tile + tl.arange(0, TILE), end - 1) // BLOCK_SIZE)
    return block.to(tl.int64)


@triton.jit
def load_planned(field):
    """A number of the plan or block table, from the L2 cache: a processor's own may hold that of the step before."""
    return tl.load(field, cache_modifier=".cg")


@triton.jit
def load_split(work, split):
    """2 * request (+ 1 if it is one split), row, first key, end, keys per chunk."""
    field = work + split * FIELDS
    return (
        load_planned(field),
        load_planned(field + 1),
        load_planned(field + 2),
        load_planned(field + 3),
        load_planned(field + 4),
    )


@triton.jit
def prefetch(
    keys, values, blocks, lowest, end, block_stride, slot_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, HEAD_BYTES: tl.constexpr,
    LINES: tl.constexpr,  # of the cache for a key, or the next power of two
):  # fmt: skip
    """Have the first `TILES` tiles of a split brought to the L2 cache, for which nobody waits."""
    line: tl.constexpr = 128  # bytes
    lane = tl.arange(0, TILE * LINES)
    first = lowest // TILE * TILE
    inside = tl.minimum(lane % LINES * line, HEAD_BYTES - 1)
    for tile in tl.static_range(TILES):
        key = tl.minimum(first + tile * TILE + lane // LINES, end - 1)
        block = load_planned(blocks + key // BLOCK_SIZE).to(tl.int64)
        offset = block * block_stride + key % BLOCK_SIZE * slot_stride
        for side in tl.static_range(2):
            place = (keys if side == 0 else values) + offset
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
                "=r,l",
                [place.to(tl.int64) + inside],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit(do_not_specialize=["table", "table_stride"])
def attend_kernel(
    q,  # [n, KV_HEADS * GROUP, HEAD_SIZE]
    k_cache,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE], as v_cache
    v_cache,
    table,  # [rows, max_blocks] int32
    sinks,  # [heads] float32, only if HAS_SINKS
    out,  # like q, contiguous
    splits,  # the plan
    work,
    turns,  # [1] int32: how many were taken, 0 when a layer begins
    partial,  # [splits, heads, HEAD_SIZE] float32
    partial_ml,  # [splits, heads, 2] float32: maximum and sum
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
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    EARLY_TILES: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take turns at (split, KV head), heads of one split side by side, since they share memory pages.

    Each begins with the turn of its own number; further ones go to the program that asks first, since splits differ in
    length.
    """
    if PDL:
        gdc_launch_dependents()
    head_row, dim, lane = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD), tl.arange(0, TILE)
    own = (head_row < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    items = load_planned(splits) * KV_HEADS
    item = tl.program_id(0)
    tag, row, lowest, end, chunk = load_split(work, item // KV_HEADS)
    if PDL:
        if EARLY_TILES > 0 and item < items:
            blocks, own_head = table + row.to(tl.int64) * table_stride, item % KV_HEADS * head_stride
            prefetch(
                k_cache + own_head, v_cache + own_head, blocks, lowest, end, block_stride, slot_stride,
                BLOCK_SIZE, TILE, EARLY_TILES, HEAD_BYTES, LINES,
            )  # fmt: skip
        gdc_wait()
    while item < items:
        split, kv_head = item // KV_HEADS, item % KV_HEADS
        # What comes next is looked up early, or each split would begin with a chain of loads.
        following = tl.num_programs(0) + tl.atomic_add(turns, 1, sem="relaxed")
        next_split = tl.minimum(following, items - 1) // KV_HEADS
        next_tag, next_row, next_lowest, next_end, next_chunk = load_split(work, next_split)
        request = (tag // 2).to(tl.int64)
        head = kv_head * GROUP + head_row
        query = tl.load(
            q + request * q_stride + head[:, None] * q_head_stride + dim[None, :], mask=own, other=0.0
        )  # [GROUP_PAD, HEAD_PAD]
        blocks = table + row.to(tl.int64) * table_stride
        keys, values = k_cache + kv_head * head_stride, v_cache + kv_head * head_stride
        m_all = tl.full([GROUP_PAD], float("-inf"), tl.float32)
        l_all = tl.zeros([GROUP_PAD], tl.float32)
        acc_all = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
        m, l, acc = m_all, l_all, acc_all  # noqa: E741
        first = lowest // TILE * TILE
        # Blocks are looked up one tile ahead: as a chain of loads within one iteration they would cost a stage.
        next_block = find_blocks(blocks, first, end, BLOCK_SIZE, TILE)
        for tile in range(first, end, TILE):
            key = tile + lane
            seen = key < end
            offset = (next_block * block_stride + key % BLOCK_SIZE * slot_stride)[:, None] + dim[None, :]
            next_block = find_blocks(blocks, tile + TILE, end, BLOCK_SIZE, TILE)
            mask = seen[:, None]
            if HEAD_SIZE != HEAD_PAD:
                mask = mask & (dim < HEAD_SIZE)[None, :]
            k = tl.load(keys + offset, mask=mask, other=0.0, eviction_policy="evict_first")
            v = tl.load(values + offset, mask=mask, other=0.0, eviction_policy="evict_first")
            scores = tl.dot(query, tl.trans(k), input_precision="ieee") * scale
            if HAS_CAP:
                scores = soft_capped(scores, cap)
            scores = tl.where((seen & (key >= lowest))[None, :], scores, float("-inf"))
            m_next = tl.maximum(m, tl.max(scores, 1))  # finite: every tile holds a key that is seen
            weights = tl.exp2(scores - m_next[:, None])
            old = tl.exp2(m - m_next)
            l = tl.fma(l, old, tl.sum(weights, 1))  # noqa: E741
            acc = tl.dot(weights.to(v.dtype), v, acc * old[:, None], input_precision="ieee")
            m = m_next
            if (tile - first + TILE) % chunk == 0:
                m_all, l_all, acc_all = merge(m_all, l_all, acc_all, m, l, acc)
                m = tl.full([GROUP_PAD], float("-inf"), tl.float32)
                l = tl.zeros([GROUP_PAD], tl.float32)  # noqa: E741
                acc = tl.zeros([GROUP_PAD, HEAD_PAD], tl.float32)
        m_all, l_all, acc_all = merge(m_all, l_all, acc_all, m, l, acc)
        if tag % 2 == 1:
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=head_row < GROUP, other=float("-inf"))
                l_all += tl.exp2(sink * 1.4426950408889634 - m_all)
            place = out + (request * (KV_HEADS * GROUP) + head[:, None]) * HEAD_SIZE + dim[None, :]
            tl.store(place, (acc_all / l_all[:, None]).to(out.dtype.element_ty), mask=own)
        else:
            part = split * (KV_HEADS * GROUP) + head
            tl.store(partial + part[:, None] * HEAD_SIZE + dim[None, :], acc_all, mask=own)
            tl.store(partial_ml + part * 2, m_all, mask=head_row < GROUP)
            tl.store(partial_ml + part * 2 + 1, l_all, mask=head_row < GROUP)
        item, tag, row, lowest, end, chunk = following, next_tag, next_row, next_lowest, next_end, next_chunk


@triton.jit
def _part(
    partial, partial_ml, start, index, count, head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """The maximum, sum and weighted values of one head in splits `index` of a request, empty from `count` on."""
    dim = tl.arange(0, HEAD_PAD)
    valid = index < count
    part = (start + index).to(tl.int64) * HEADS + head
    m = tl.load(partial_ml + part * 2, mask=valid, other=float("-inf"))
    l = tl.load(partial_ml + part * 2 + 1, mask=valid, other=0.0)  # noqa: E741
    mask = valid[:, None] & (dim < HEAD_SIZE)[None, :]
    return m, l, tl.load(partial + part[:, None] * HEAD_SIZE + dim[None, :], mask=mask, other=0.0)


@triton.jit
def sum_sections(
    partial, partial_ml, sinks, start, ratio, count, head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, HAS_SINKS: tl.constexpr,
    SECTIONS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One head's mean `[HEAD_PAD]` over up to `SECTIONS` sections: chunks to sections in order, then all at once.

    With `AT_ONCE` all chunks are asked for before the first has come, which takes registers.
    """
    section = tl.arange(0, SECTIONS) * ratio
    m = tl.full([SECTIONS], float("-inf"), tl.float32)
    l = tl.zeros([SECTIONS], tl.float32)  # noqa: E741
    acc = tl.zeros([SECTIONS, HEAD_PAD], tl.float32)
    if AT_ONCE:
        for j in tl.static_range(CHUNKS):
            end = tl.where(j < ratio, count, 0)
            part = _part(partial, partial_ml, start, section + j, end, head, HEADS, HEAD_SIZE, HEAD_PAD)
            m, l, acc = merge(m, l, acc, part[0], part[1], part[2])  # noqa: E741
    else:
        for j in range(ratio):
            part = _part(partial, partial_ml, start, section + j, count, head, HEADS, HEAD_SIZE, HEAD_PAD)
            m, l, acc = merge(m, l, acc, part[0], part[1], part[2])  # noqa: E741
    m_all = tl.max(m, 0)
    weight = tl.exp2(m - m_all)
    l_all = tl.sum(l * weight, 0)
    if HAS_SINKS:
        l_all += tl.exp2(tl.load(sinks + head) * 1.4426950408889634 - m_all)
    return tl.sum(acc * weight[:, None], 0) / l_all


@triton.jit(do_not_specialize=["heads_each"])
def combine_kernel(
    out,  # [n, heads, HEAD_SIZE]
    sinks,
    requests,
    turns,
    partial,
    partial_ml,
    heads_each,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FILLS: tl.constexpr,  # the lines of requests of length 0
    PDL: tl.constexpr,
):
    """One program for some heads of a request. Most requests are in one split, which leaves nothing to do."""
    request, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * heads_each
    if PDL:
        gdc_launch_dependents()
    start, count, ratio = (
        load_planned(requests + request * 4),
        load_planned(requests + request * 4 + 1),
        load_planned(requests + request * 4 + 2),
    )
    if PDL:
        gdc_wait()
    if request + first == 0:
        tl.store(turns, 0)  # they begin anew with the next layer
    dim = tl.arange(0, HEAD_PAD)
    if count > 1 or (FILLS and count == 0):
        for head in range(first, tl.minimum(first + heads_each, HEADS)):
            mean = tl.zeros([HEAD_PAD], tl.float32)
            if count > ratio:
                mean = sum_sections(
                    partial, partial_ml, sinks, start, ratio, count, head,
                    HEADS, HEAD_SIZE, HEAD_PAD, HAS_SINKS, MAX_SECTIONS, False,
                )  # fmt: skip
            elif count > 1:
                mean = sum_sections(
                    partial, partial_ml, sinks, start, ratio, count, head,
                    HEADS, HEAD_SIZE, HEAD_PAD, HAS_SINKS, 1, True,
                )  # fmt: skip
            place = out + (request * HEADS + head) * HEAD_SIZE + dim
            tl.store(place, mean.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)
