"""Packs (value, token id) pairs into int64 numbers that sort by higher value, then lower id.

The upper half holds the bits of the float32 value, turned so that they compare as integers; the lower half holds the
complement of the id. No two tokens have the same pair, so a maximum, a sort or a top-k over pairs has one answer,
whichever rank or device computes it. -0.0 equals 0.0.

`NOT_FINITE` in the upper half, above that of every number, says that a line had a logit that is NaN or infinite. So
the maximum over all ranks' pairs says it, too, and costs nothing more. The id beside it means nothing, but is valid.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from eagleray.parallel.platform import platform_of
from eagleray.workers.arrays import BoolArray, IntArray

PAD = -(1 << 63)  # below the pair of every token
NOT_FINITE = 0x7FFFFFFF  # the upper half of a pair that stands for a line which nothing can be drawn from
MASKED = -0x7F800001  # the upper half of a masked token's pair, whose value is minus infinity; `PAD` has a lower one
_LOW = 0xFFFFFFFF
_GROUP_SIZES = (256, 64, 16)
_HOST_BLOCK = 1 << 17  # elements; the temporaries of one block stay in a core's cache


def pack(values: Tensor, token_ids: Tensor) -> Tensor:
    """Pairs [...] int64 of `values` [...] float32 and `token_ids` [...] int64 below 2**32."""
    bits = (values + 0.0).view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.to(torch.int64).bitwise_left_shift_(32).add_(_LOW - token_ids)


def unpack(pairs: Tensor) -> tuple[Tensor, Tensor]:
    """The values [...] float32 (NaN for `PAD`) and token ids [...] int64 of `pairs`."""
    ordered = (pairs >> 32).to(torch.int32)
    bits = (ordered >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(ordered)
    return bits.view(torch.float32), unpack_ids(pairs)


def unpack_ids(pairs: Tensor) -> Tensor:
    return _LOW - (pairs & _LOW)


def marks_of(pairs: Tensor) -> Tensor:
    """The marks [n] among `pairs` [n], and `PAD` for the others."""
    return torch.where((pairs >> 32) == NOT_FINITE, pairs, PAD)


def find_marks(logits: Tensor, first_id: int) -> Tensor:
    """The mark for each line of `logits` [n, shard] that holds NaN or an infinity, and `PAD` for the others, [n].

    A finite sum has none of them; one that is not may have overflowed.
    """
    finite = logits.sum(dim=-1).isfinite()
    if not finite.all():
        finite = logits.amin(dim=-1).isfinite() & logits.amax(dim=-1).isfinite()
    return torch.where(finite, PAD, (NOT_FINITE << 32) + _LOW - first_id)


def unpack_host(
    pairs: IntArray,
) -> tuple[IntArray, BoolArray, BoolArray]:
    """The token ids of lines' best pairs on the host, which of these are marks, and which are of masked tokens."""
    values = pairs >> 32
    return _LOW - (pairs & _LOW), values == NOT_FINITE, values <= MASKED


def best_pairs(values: Tensor, first_id: int) -> Tensor:
    """The highest pair [n] of each line of `values` [n, shard], whose columns are tokens from `first_id` on."""
    token_ids = torch.arange(first_id, first_id + values.shape[1], device=values.device)
    likely, ids = _of_best_groups(values, token_ids, 1)
    return pack(likely, ids).amax(dim=-1)


def top_pairs(values: Tensor, first_id: int, width: int) -> Tensor:
    """The `width` highest pairs [n, width] of each line of `values` [n, shard], in order.

    Columns are tokens from `first_id` on; `PAD` fills up where the shard is narrower than `width`.
    """
    num_lines, shard = values.shape
    kept = min(width, shard)
    top = torch.full((num_lines, width), PAD, dtype=torch.int64, device=values.device)
    token_ids = torch.arange(first_id, first_id + shard, device=values.device)
    likely, ids = _of_best_groups(values, token_ids, kept)
    for block in line_blocks(likely):
        top[block, :kept] = pack(likely[block], ids[block]).topk(kept, dim=-1).values
    return top


def _of_best_groups(values: Tensor, token_ids: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Fewer columns of `values` [n, shard], with their ids, that still hold the `width` highest pairs of each line.

    Columns stand in groups. A pair outside of the `width` groups with the highest first pairs is below each of those,
    so it is not among the `width` highest itself. Reading only maxima is many times faster than packing everything.
    """
    num_lines, shard = values.shape
    size = next((size for size in _GROUP_SIZES if 4 * width * size <= shard), 0)
    if not size:
        return values, token_ids.expand(num_lines, -1)
    num_groups = shard // size
    grouped = values[:, : num_groups * size].view(num_lines, num_groups, size)
    pairs = pack(grouped.amax(dim=-1), torch.arange(num_groups, device=values.device))
    groups = unpack_ids(pairs.topk(width, dim=-1).values)
    index = groups.unsqueeze(2).expand(-1, -1, size)
    ids = token_ids[: num_groups * size].view(num_groups, size)[groups].flatten(1)
    rest = slice(num_groups * size, None)
    return (
        torch.cat([grouped.gather(1, index).flatten(1), values[:, rest]], dim=1),
        torch.cat([ids, token_ids[rest].expand(num_lines, -1)], dim=1),
    )


def merge(gathered: Tensor) -> Tensor:
    """The ranks' pairs `gathered` [size, n, width], each line in order, as one [n, size * width] in order."""
    if len(gathered) == 1:
        return gathered[0]
    return gathered.movedim(0, 1).flatten(1).sort(dim=-1, descending=True).values


def line_blocks(x: Tensor) -> Iterator[slice]:
    """Slices over the lines of `x` [n, width]: all at once on an accelerator, a cacheful at a time on the host."""
    num_lines, width = x.shape
    on_host = platform_of(x.device).accelerator is None
    step = max(1, _HOST_BLOCK // max(1, width)) if on_host else max(1, num_lines)
    return (slice(start, min(start + step, num_lines)) for start in range(0, num_lines, step))
