"""Allocates the KV cache: which blocks a request holds in every KV group, and which of them others find as prefixes."""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from eagleray.cluster.core.block_pool import ROOT, BlockPool, hash_block


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers that share a block table: `num_blocks` blocks of `block_size` tokens each."""

    num_blocks: int
    block_size: int


@dataclass(slots=True)
class Blocks:
    """What one request holds in one group."""

    ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the full blocks of committed tokens
    num_published: int = 0  # of `ids`, offered to the prefix cache


def headroom(num_blocks: int) -> int:
    """Blocks left to those who run, so that a newcomer is not preempted in the next step: one hundredth of all."""
    return max(1, num_blocks // 100)


class Holder(Protocol):
    """What the manager knows of a request."""

    token_ids: "array[int]"  # prompt and committed tokens
    num_computed_tokens: int  # whose KV is written once the steps in flight are done
    blocks: list[Blocks]  # one for each group


@dataclass(frozen=True, slots=True)
class Prefix:
    """Cached blocks that begin a request, in every group. No reference to them is held."""

    ids: list[list[int]]
    num_tokens: int


class KVCacheManager:
    """A request is matched with cached prefixes, has blocks allocated as it grows, publishes them, and releases them.

    Groups have pools and block sizes of their own. A prefix is as long as what all of them hold of it.
    """

    def __init__(self, groups: Sequence[KVGroup], *, enable_prefix_caching: bool = True) -> None:
        self.groups = tuple(groups)
        self._pools = [BlockPool(group.num_blocks) for group in groups]
        self._sizes = [group.block_size for group in groups]
        self.caches_prefixes = enable_prefix_caching

    @property
    def num_blocks(self) -> int:
        """Of all groups."""
        return sum(pool.num_blocks for pool in self._pools)

    @property
    def num_used(self) -> int:
        """Blocks that requests hold, of all groups."""
        return sum(pool.num_used for pool in self._pools)

    @property
    def num_tokens(self) -> int:
        """How many tokens a single request can have."""
        return min(group.num_blocks * group.block_size for group in self.groups)

    def new_blocks(self) -> list[Blocks]:
        """What a request begins with."""
        return [Blocks() for _ in self.groups]

    def _groups_of(self, holder: Holder) -> Iterable[tuple[BlockPool, int, Blocks]]:
        """Pool, block size and the request's blocks, of every group. Of one, which most models have, it takes less."""
        if len(self._pools) == 1:
            return ((self._pools[0], self._sizes[0], holder.blocks[0]),)
        return zip(self._pools, self._sizes, holder.blocks, strict=True)

    # ---- is there room

    def is_tight(self, count: int) -> bool:
        """Whether some group has fewer than `count` free blocks."""
        return any(pool.num_free < count for pool in self._pools)

    def fits_next_tokens(self, holders: Iterable[Holder]) -> bool:
        """Whether one more token of each of `holders` finds its blocks."""
        missing = [0] * len(self._pools)
        for holder in holders:
            for index, size in enumerate(self._sizes):
                missing[index] += holder.num_computed_tokens + 1 > len(holder.blocks[index].ids) * size
        return all(pool.num_free >= count for pool, count in zip(self._pools, missing, strict=True))

    def num_tokens_that_fit(self, holder: Holder, num_tokens: int) -> int:
        """How many of the next `num_tokens` tokens find blocks; not above 0 if none does."""
        if holder.num_computed_tokens + num_tokens <= self.num_tokens_held(holder):
            return num_tokens
        for pool, size, blocks in self._groups_of(holder):
            room = (len(blocks.ids) + pool.num_free) * size - holder.num_computed_tokens
            num_tokens = min(num_tokens, room)
        return num_tokens

    def fits_start(self, prefix: Prefix, num_tokens: int, *, keep_headroom: bool) -> bool:
        """Whether a request of this prefix finds blocks for its next `num_tokens`.

        With `keep_headroom` some are left to those who run.
        """
        for pool, size, cached in zip(self._pools, self._sizes, prefix.ids, strict=True):
            missing = -(-(prefix.num_tokens + num_tokens) // size) - len(cached)
            spare = headroom(pool.num_blocks) if keep_headroom else 0
            if pool.num_free - pool.num_free_among(cached) < missing + spare:
                return False
        return True

    def num_tokens_held(self, holder: Holder) -> int:
        """For how many tokens its blocks are enough."""
        if len(self._sizes) == 1:  # asked several times a step for every request: a minimum of one takes a while
            return len(holder.blocks[0].ids) * self._sizes[0]
        return min(len(blocks.ids) * size for blocks, size in zip(holder.blocks, self._sizes, strict=True))

    # ---- blocks come and go

    def match(self, holder: Holder) -> Prefix:
        """The longest cached prefix. The last token is never part of it, since its logits are wanted."""
        if not self.caches_prefixes:
            return self.no_prefix()
        self._hash(holder)
        found = []
        for pool, size, blocks in self._groups_of(holder):
            found.append(pool.match(blocks.hashes[: (len(holder.token_ids) - 1) // size]))
        num_tokens = min(len(ids) * size for ids, size in zip(found, self._sizes, strict=True))
        while any(num_tokens % size for size in self._sizes):
            num_tokens = min(num_tokens - num_tokens % size for size in self._sizes)
        return Prefix([ids[: num_tokens // size] for ids, size in zip(found, self._sizes, strict=True)], num_tokens)

    def no_prefix(self) -> Prefix:
        """Of a request that is to run all of its tokens."""
        return Prefix([[] for _ in self._pools], 0)

    def start(self, holder: Holder, prefix: Prefix, num_tokens: int) -> None:
        """Give a request its prefix, and blocks for the `num_tokens` after it. The caller has asked `fits_start`."""
        for pool, size, blocks, cached in zip(self._pools, self._sizes, holder.blocks, prefix.ids, strict=True):
            pool.share(cached)
            blocks.ids = cached + pool.allocate(-(-(prefix.num_tokens + num_tokens) // size) - len(cached))
            blocks.num_published = len(cached)

    def allocate(self, holder: Holder, num_tokens: int) -> list[list[int]] | None:
        """Blocks of every group for its next `num_tokens`; None if it has enough. The caller has seen that they fit."""
        end = holder.num_computed_tokens + num_tokens
        if end <= self.num_tokens_held(holder):
            return None
        taken: list[list[int]] = []
        for pool, size, blocks in self._groups_of(holder):
            new = pool.allocate(max(0, -(-end // size) - len(blocks.ids)))
            blocks.ids += new
            taken.append(new)
        return taken

    def publish(self, holder: Holder) -> None:
        """Let full blocks of committed tokens be found by others, as soon as a step that writes them is scheduled."""
        if not self.caches_prefixes:
            return
        num_tokens = min(holder.num_computed_tokens, len(holder.token_ids))
        for pool, size, blocks in self._groups_of(holder):
            if (num_full := num_tokens // size) > blocks.num_published:
                self._hash(holder)
                for index in range(blocks.num_published, num_full):
                    pool.publish(blocks.ids[index], blocks.hashes[index])
                blocks.num_published = num_full

    def unpublish(self, holder: Holder, num_tokens: int) -> None:
        """Let nothing be found of what it has written after its first `num_tokens` tokens."""
        for pool, size, blocks in self._groups_of(holder):
            pool.unpublish(blocks.hashes[num_tokens // size :])

    def release(self, holder: Holder) -> None:
        """Take a request's blocks away. What is published stays to be found until a block is given out again."""
        for pool, blocks in zip(self._pools, holder.blocks, strict=True):
            pool.release(blocks.ids)
            blocks.ids, blocks.num_published = [], 0

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the ranks' KV is gone or must not be trusted."""
        for pool in self._pools:
            pool.forget_prefixes()

    def _hash(self, holder: Holder) -> None:
        """Bring the hashes up to date with the committed tokens."""
        token_ids = holder.token_ids
        for size, blocks in zip(self._sizes, holder.blocks, strict=True):
            hashes = blocks.hashes
            for begin in range(len(hashes) * size, len(token_ids) - size + 1, size):
                hashes.append(hash_block(hashes[-1] if hashes else ROOT, token_ids[begin : begin + size]))
