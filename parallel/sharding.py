"""Who owns what: a tensor is cut in units, and rank `r` of `n` owns a contiguous range of them.

Plain arithmetic without torch, so the driver can check a tensor-parallel size before anything starts.
"""

from typing import NamedTuple

MAX_BLOCK = 64  # columns


class HeadShard(NamedTuple):
    """The attention heads of one rank, as ranges of the whole model's heads."""

    query: range
    kv: range


def shard(units: int, rank: int, size: int) -> range:
    """The units of `rank` among `size` ranks. Where `units` does not divide, the first ranks own one more.

    Raises `ValueError` when there is no such rank, or when a rank would own nothing.
    """
    if not 0 <= rank < size:
        raise ValueError(f"there is no rank {rank} among {size}; ranks count from 0")
    if units < size:
        raise ValueError(f"{units} units cannot be shared by {size} ranks; use at most {units}")
    least, extra = divmod(units, size)
    start = rank * least + min(rank, extra)
    return range(start, start + least + (rank < extra))


def shard_columns(columns: int, rank: int, size: int) -> range:
    """The columns of `rank`, cut at multiples of a block so that every shard stays well aligned in memory.

    The block is the largest power of two up to `MAX_BLOCK` that divides `columns` and leaves every rank a block.
    """
    block = MAX_BLOCK
    while block > 1 and (columns % block or columns // block < size):
        block //= 2
    blocks = shard(columns // block, rank, size)
    return range(blocks.start * block, blocks.stop * block)


def shard_heads(num_heads: int, num_kv_heads: int, rank: int, size: int) -> HeadShard:
    """The heads of `rank`: KV heads, each with all of its query heads, as long as there is one for every rank.

    With more ranks than KV heads, ranks are dealt over the KV heads, and the ranks of one KV head each keep a copy of
    it and share its query heads. Raises `ValueError` when a rank would own no query head.
    """
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide evenly among {num_kv_heads} KV heads")
    if size > num_heads:
        raise ValueError(
            f"tensor_parallel_size {size} is more than the model's {num_heads} attention heads; use at most {num_heads}"
        )
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        kv = shard(num_kv_heads, rank, size)
        return HeadShard(query=range(kv.start * group, kv.stop * group), kv=kv)
    head = _kv_head_of(num_kv_heads, rank, size)
    ranks = shard(size, head, num_kv_heads)
    query = shard(group, rank - ranks.start, len(ranks))
    return HeadShard(
        query=range(head * group + query.start, head * group + query.stop),
        kv=range(head, head + 1),
    )


def _kv_head_of(num_kv_heads: int, rank: int, size: int) -> int:
    """Which KV head `rank` serves, where ranks outnumber KV heads."""
    for head in range(num_kv_heads):
        if rank in shard(size, head, num_kv_heads):
            return head
    raise ValueError(f"there is no rank {rank} among {size}; ranks count from 0")
