"""Triton kernels of decode attention: the plan (`plan_kernel`), the attention itself, and the combination of its
splits.

How a request's keys are cut, and why its result does not depend on the batch: see `decode.py`. The plan and the block
table are read before the kernels that run meanwhile have ended, which `plan_decode` makes safe.
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
    section = tl.where(sections > 1, even, SECTION)
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
def load_split(work, split):
    """2 * request (+ 1 if it is one split), row, first key, end, keys per chunk."""
    field = work + split * FIELDS
    return tl.load(field), tl.load(field + 1), tl.load(field + 2), tl.load(field + 3), tl.load(field + 4)


@triton.jit
def load_request(requests, request):
    """First split, splits, and in how many each section is cut."""
    field = requests + request * 4
    return tl.load(field), tl.load(field + 1), tl.load(field + 2)


@triton.jit
def _part(
    partial, partial_ml, start, index, count, head,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr,
):  # fmt: skip
    """The maximum, sum and weighted values of `head` in splits `index` of a request, empty from `count` on.

    From the L2 cache, since the processor that this runs on may hold what the layer before left in their place.
    """
    dim = tl.arange(0, HEAD_PAD)
    valid = (index < count) & (head < HEADS)
    part = (start + index).to(tl.int64) * HEADS + head
    m = tl.load(partial_ml + part * 2, mask=valid, other=float("-inf"), cache_modifier=".cg")
    l = tl.load(partial_ml + part * 2 + 1, mask=valid, other=0.0, cache_modifier=".cg")  # noqa: E741
    place = partial + part[:, None] * HEAD_SIZE + dim[None, :]
    return m, l, tl.load(place, mask=valid[:, None] & (dim < HEAD_SIZE)[None, :], other=0.0, cache_modifier=".cg")


@triton.jit
def sum_sections(
    partial, partial_ml, sinks, start, ratio, count, first,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, HAS_SINKS: tl.constexpr,
    EACH: tl.constexpr, SECTIONS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Means `[EACH, HEAD_PAD]` of the heads from `first` on over up to `SECTIONS` sections.

    Chunks become sections one after the other, and sections the result all at once. With `AT_ONCE` all chunks are asked
    for before the first has come, which takes registers.
    """
    line = tl.arange(0, SECTIONS * EACH)  # heads of one section side by side
    section, head = line // EACH * ratio, first + line % EACH
    m = tl.full([SECTIONS * EACH], float("-inf"), tl.float32)
    l = tl.zeros([SECTIONS * EACH], tl.float32)  # noqa: E741
    acc = tl.zeros([SECTIONS * EACH, HEAD_PAD], tl.float32)
    if AT_ONCE:
        for j in tl.static_range(CHUNKS):
            end = tl.where(j < ratio, count, 0)
            part = _part(partial, partial_ml, start, section + j, end, head, HEADS, HEAD_SIZE, HEAD_PAD)
            m, l, acc = merge(m, l, acc, part[0], part[1], part[2])  # noqa: E741
    else:
        for j in range(ratio):
            part = _part(partial, partial_ml, start, section + j, count, head, HEADS, HEAD_SIZE, HEAD_PAD)
            m, l, acc = merge(m, l, acc, part[0], part[1], part[2])  # noqa: E741
    m, l = tl.reshape(m, [SECTIONS, EACH]), tl.reshape(l, [SECTIONS, EACH])  # noqa: E741
    m_all = tl.max(m, 0)
    weight = tl.exp2(m - m_all[None, :])
    l_all = tl.sum(l * weight, 0)
    if HAS_SINKS:
        own = first + tl.arange(0, EACH)
        sink = tl.load(sinks + own, mask=own < HEADS, other=float("-inf"))
        l_all += tl.exp2(sink * 1.4426950408889634 - m_all)
    values = tl.reshape(acc, [SECTIONS, EACH, HEAD_PAD]) * weight[:, :, None]
    return tl.sum(values, 0) / l_all[:, None]


@triton.jit
def combine(
    out, sinks, partial, partial_ml, request, start, count, ratio, first, heads,
    HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, HEAD_PAD: tl.constexpr, HAS_SINKS: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Put together the splits of `heads` heads of a request from `first` on, and write the result; 0 with no split."""
    dim, each = tl.arange(0, HEAD_PAD), tl.arange(0, EACH)
    for head in range(first, first + heads, EACH):
        mean = tl.zeros([EACH, HEAD_PAD], tl.float32)
        if count > ratio:
            mean = sum_sections(
                partial, partial_ml, sinks, start, ratio, count, head,
                HEADS, HEAD_SIZE, HEAD_PAD, HAS_SINKS, EACH, MAX_SECTIONS, False,
            )  # fmt: skip
        elif count > 0:
            mean = sum_sections(
                partial, partial_ml, sinks, start, ratio, count, head,
                HEADS, HEAD_SIZE, HEAD_PAD, HAS_SINKS, EACH, 1, True,
            )  # fmt: skip
        own = (head + each < first + heads)[:, None] & (dim < HEAD_SIZE)[None, :]
        place = out + (request * HEADS + head + each)[:, None] * HEAD_SIZE + dim[None, :]
        tl.store(place, mean.to(out.dtype.element_ty), mask=own)


@triton.jit
def prefetch(keys, values, blocks, lowest, end, block_stride, slot_stride,
    BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, HEAD_BYTES: tl.constexpr,
    LINES: tl.constexpr,  # of the cache for a key, or the next power of two
):  # fmt: skip
    """Have the first `TILES` tiles of a split brought to the L2 cache, at which nobody waits."""
    line: tl.constexpr = 128  # bytes
    lane = tl.arange(0, TILE * LINES)
    first = lowest // TILE * TILE
    inside = tl.minimum(lane % LINES * line, HEAD_BYTES - 1)
    for tile in tl.static_range(TILES):
        key = tl.minimum(first + tile * TILE + lane // LINES, end - 1)
        block = tl.load(blocks + key // BLOCK_SIZE).to(tl.int64)
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


@triton.jit(do_not_specialize=["table", "table_stride", "n"])
def attend_kernel(
    q,  # [n, KV_HEADS * GROUP, HEAD_SIZE]
    k_cache,  # [num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_SIZE], as v_cache
    v_cache,
    table,  # [rows, max_blocks] int32
    sinks,  # [heads] float32, only if HAS_SINKS
    out,  # like q, contiguous
    splits,  # the plan
    requests,
    work,
    turns,  # [1 + n * KV_HEADS] int32, 0: how many turns were taken, and how many splits of a request and head are done
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
    n,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    COMBINES: tl.constexpr,
    EACH: tl.constexpr,  # heads at once, if it combines
    FILLS: tl.constexpr,  # the lines of requests of length 0, if it combines
    EARLY: tl.constexpr,  # tiles of its first split that a program asks for before it may read them
    HEAD_BYTES: tl.constexpr,
    LINES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs take turns at (split, KV head), heads of one split side by side, since they share memory pages.

    Each begins with the turn of its own number. If it does not combine, further ones go to the program that asks first,
    since splits differ in length. If it combines, who ends the last split of a request's head has all of them read.
    """
    if PDL:
        gdc_launch_dependents()
    head_row, dim, lane = tl.arange(0, GROUP_PAD), tl.arange(0, HEAD_PAD), tl.arange(0, TILE)
    own = (head_row < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    items = tl.load(splits) * KV_HEADS
    item = tl.program_id(0)
    tag, row, lowest, end, chunk = load_split(work, item // KV_HEADS)
    if PDL:
        if EARLY > 0 and item < items:
            prefetch(
                k_cache + item % KV_HEADS * head_stride, v_cache + item % KV_HEADS * head_stride,
                table + row.to(tl.int64) * table_stride, lowest, end, block_stride, slot_stride,
                BLOCK_SIZE, TILE, EARLY, HEAD_BYTES, LINES,
            )  # fmt: skip
        gdc_wait()
    if COMBINES and FILLS:
        for empty in range(item, n, tl.num_programs(0)):
            if tl.load(requests + empty * 4 + 1) == 0:
                for head in range(KV_HEADS * GROUP):
                    line = out + (empty * (KV_HEADS * GROUP) + head) * HEAD_SIZE  # few requests: 32 bits will do
                    tl.store(line + dim, tl.zeros([HEAD_PAD], out.dtype.element_ty), mask=dim < HEAD_SIZE)
    while item < items:
        split, kv_head = item // KV_HEADS, item % KV_HEADS
        # What comes next is looked up early, or each split would begin with a chain of loads.
        if COMBINES:
            following = item + tl.num_programs(0)
        else:
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
            if COMBINES:
                start, count, ratio = load_request(requests, request)
                arrivals = turns + 1 + request * KV_HEADS + kv_head
                tl.debug_barrier()  # what all threads have stored goes before the count
                if tl.atomic_add(arrivals, 1, sem="acq_rel") == count - 1:
                    tl.store(arrivals, 0)
                    combine(
                        out, sinks, partial, partial_ml, request, start, count, ratio, kv_head * GROUP, GROUP,
                        KV_HEADS * GROUP, HEAD_SIZE, HEAD_PAD, HAS_SINKS, EACH,
                    )  # fmt: skip
        item, tag, row, lowest, end, chunk = following, next_tag, next_row, next_lowest, next_end, next_chunk


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
    start, count, ratio = load_request(requests, request)
    if PDL:
        gdc_wait()
    if request + first == 0:
        tl.store(turns, 0)  # turns begin anew with the next layer
    if count > 1 or (FILLS and count == 0):
        heads = tl.minimum(heads_each, HEADS - first)
        combine(
            out, sinks, partial, partial_ml, request, start, count, ratio, first, heads,
            HEADS, HEAD_SIZE, HEAD_PAD, HAS_SINKS, 1,
        )  # fmt: skip
