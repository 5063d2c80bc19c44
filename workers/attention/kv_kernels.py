"""Triton kernel that applies rotary positions and writes keys and values to the paged cache in one launch."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.platform import LAUNCH, OVERLAP
from eagleray.workers.attention.context import PagedKVLayer

HEADS_AT_ONCE = 8
BYTES_AT_ONCE = 16_384


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, layer: PagedKVLayer
) -> Tensor:
    """As `op.rotate_and_write`; each token's heads lie side by side in `q`, `k` and `v`, and so do the cache's."""
    kv_cache, slot_mapping = layer.cache.kv, layer.metadata.slot_mapping
    tokens, num_q, head_size = q.shape
    num_k = k.shape[1]
    cos, sin = rotation or (None, None)
    turned = q if rotation is None else q.new_empty(q.shape)
    num_programs = triton.cdiv(num_q, HEADS_AT_ONCE) + 2 * triton.cdiv(num_k, HEADS_AT_ONCE)
    _rotate_and_write_kernel[(tokens, num_programs)](
        q, k, v, cos, sin, turned, kv_cache, layer.cache.marks, slot_mapping, slot_mapping.shape[0],
        q.stride(0), k.stride(0), v.stride(0), kv_cache.stride(0), kv_cache.shape[2], num_q, num_k,
        HALF=head_size // 2, BLOCK=triton.next_power_of_2(head_size // 2), HEADS=HEADS_AT_ONCE,
        ROTATES=rotation is not None, PDL=OVERLAP, num_warps=4, **LAUNCH,
    )  # fmt: skip
    return turned


@triton.jit(do_not_specialize=["num_slots", "block_size", "num_q", "num_k"])
def _rotate_and_write_kernel(
    q, k, v,  # [tokens, heads, 2 * HALF]
    cos, sin,  # [tokens, 1, 2 * HALF] float32, only if ROTATES; the first half of the sines is negated
    turned,  # like q, contiguous
    cache,  # [2, slots, num_k, 2 * HALF]
    marks,  # [blocks] int8, of which those become 1 that hold a number that is not finite
    slots,  # [num_slots] int64
    num_slots, q_stride, k_stride, v_stride, side_stride, block_size, num_q, num_k,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, ROTATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program for some heads of one token: of its queries, its keys or its values."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_programs, k_programs = tl.cdiv(num_q, HEADS), tl.cdiv(num_k, HEADS)
    slot = tl.load(slots + tl.minimum(token, num_slots - 1))
    if program < q_programs:
        source, target, count, first = (
            q + token * q_stride,
            turned + token * num_q * 2 * HALF,
            num_q if ROTATES else 0,
            program * HEADS,
        )
    elif program < q_programs + k_programs:
        source, target, count = k + token * k_stride, cache + slot * num_k * 2 * HALF, num_k
        first = (program - q_programs) * HEADS
    else:
        source, target, count = v + token * v_stride, cache + side_stride + slot * num_k * 2 * HALF, num_k
        first = (program - q_programs - k_programs) * HEADS
    count = tl.where((program >= q_programs) & (token >= num_slots), 0, count)  # padding has no slot
    heads, pair = first + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (heads < count)[:, None] & (pair < HALF)[None, :]
    place = heads[:, None] * (2 * HALF) + pair[None, :]
    low = tl.load(source + place, mask=inside, other=0.0)
    high = tl.load(source + place + HALF, mask=inside, other=0.0)
    if ROTATES:
        turned_pairs = tl.where(program < q_programs + k_programs, HALF, 0)  # values stay as they are
        angle, known = token * 2 * HALF + pair, pair < turned_pairs
        cos_low, sin_low = tl.load(cos + angle, mask=known, other=1.0), tl.load(sin + angle, mask=known, other=0.0)
        cos_high = tl.load(cos + angle + HALF, mask=known, other=1.0)
        sin_high = tl.load(sin + angle + HALF, mask=known, other=0.0)
        x, y = low.to(tl.float32), high.to(tl.float32)
        low = (x * cos_low[None, :] + y * sin_low[None, :]).to(low.dtype)
        high = (y * cos_high[None, :] + x * sin_high[None, :]).to(high.dtype)
    tl.store(target + place, low, mask=inside)
    tl.store(target + place + HALF, high, mask=inside)
    finite = (tl.abs(low.to(tl.float32)) < float("inf")) & (tl.abs(high.to(tl.float32)) < float("inf"))
    if program >= q_programs:
        tl.store(marks + slot // block_size + tl.zeros_like(place), 1, mask=inside & (finite == 0))


def clean_blocks(blocks: Tensor, marks: Tensor, addresses: Tensor, side_bytes: Tensor) -> None:
    """Zero what is marked of `blocks` [n] in every layer, and take the marks away.

    `marks` is [layers, num_blocks] int8, `addresses` [layers] int64 of contiguous caches [2, num_blocks, ...], and
    `side_bytes` [layers] int64 the bytes of each half, keys or values, of one. Nothing is asked of the host.
    """
    num_layers, num_blocks = marks.shape
    _clean_kernel[(len(blocks), num_layers)](
        blocks, marks, addresses, side_bytes, num_blocks, BYTES_AT_ONCE, OVERLAP, num_warps=4, **LAUNCH
    )


@triton.jit(do_not_specialize=["num_blocks"])
def _clean_kernel(blocks, marks, addresses, side_bytes, num_blocks, BYTES: tl.constexpr, PDL: tl.constexpr):
    """One program for a block in a layer."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block, layer = tl.load(blocks + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    mark = marks + layer * num_blocks + block
    if tl.load(mark) != 0:
        side = tl.load(side_bytes + layer)
        block_bytes = side // num_blocks
        first = tl.load(addresses + layer).to(tl.pointer_type(tl.int8)) + block * block_bytes
        for start in range(0, block_bytes, BYTES):
            place = start + tl.arange(0, BYTES)
            inside = place < block_bytes
            zero = tl.zeros([BYTES], tl.int8)
            tl.store(first + place, zero, mask=inside)
            tl.store(first + side + place, zero, mask=inside)
        tl.store(mark, 0)
