"""(value, token id) pairs as single int64 numbers whose order is "higher value first, then lower id".

The upper half holds the bits of the float32 value, turned so that they compare as integers; the lower half holds the
complement of the id. No two tokens have the same pair, so a maximum, a sort or a top-k over pairs has one answer,
whichever rank or device computes it. -0.0 equals 0.0 and NaN with a clear sign bit ranks above everything.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

PAD = -(1 << 63)  # below the pair of every token
_LOW = 0xFFFFFFFF
_CPU_BLOCK = 1 << 17  # elements; the temporaries of one block stay in a core's cache


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


def best_pairs(values: Tensor, first_id: int) -> Tensor:
    """The highest pair [n] of each line of `values` [n, share], whose columns are tokens from `first_id` on."""
    best, column = values.max(dim=-1)  # documented: the first of equal maxima
    return pack(best, column + first_id)


def top_pairs(values: Tensor, first_id: int, width: int) -> Tensor:
    """The `width` highest pairs [n, width] of each line of `values` [n, share], in order.

    Columns are tokens from `first_id` on; `PAD` fills up where the share is narrower than `width`.
    """
    num_lines, share = values.shape
    kept = min(width, share)
    top = torch.full((num_lines, width), PAD, dtype=torch.int64, device=values.device)
    token_ids = torch.arange(first_id, first_id + share, device=values.device)
    for block in line_blocks(values):
        top[block, :kept] = pack(values[block], token_ids).topk(kept, dim=-1).values
    return top


def line_blocks(x: Tensor) -> Iterator[slice]:
    """Slices over the lines of `x` [n, width]: all at once on an accelerator, a cacheful at a time on the CPU."""
    num_lines, width = x.shape
    step = max(1, _CPU_BLOCK // max(1, width)) if x.device.type == "cpu" else max(1, num_lines)
    return (slice(start, min(start + step, num_lines)) for start in range(0, num_lines, step))
