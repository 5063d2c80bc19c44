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
    """Blocks kept for running requests, so that a new one is not preempted in the next step: one hundredth of all."""
    return max(1, num_blocks // 100)


class Holder(Protocol):
    """What the manager knows of a request."""

    token_ids: "array[int]"  # prompt and committed tokens
    num_computed_tokens: int  # whose KV is written once the steps in flight are done
    blocks: list[Blocks]  # one for each group
    num_held_tokens: int  # for which its blocks are enough, in every group; the manager keeps it
    num_to_publish: int  # as many committed tokens fill another block of some group; the manager keeps it


def hash_full_blocks(hashes: list[bytes], token_ids: "array[int]", size: int) -> None:
    """Add the missing hashes of the full blocks of these tokens."""
    for begin in range(len(hashes) * size, len(token_ids) - size + 1, size):
        hashes.append(hash_block(hashes[-1] if hashes else ROOT, token_ids[begin : begin + size]))


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
        self._pools_and_sizes = list(zip(self._pools, self._sizes, strict=True))
        self.num_tokens = min(group.num_blocks * group.block_size for group in groups)  # a single request can have
        self.caches_prefixes = enable_prefix_caching

    @property
    def num_blocks(self) -> int:
        """Blocks of all groups."""
        return sum(pool.num_blocks for pool in self._pools)

    @property
    def num_used(self) -> int:
        """Blocks of all groups that requests hold."""
        return sum(pool.num_used for pool in self._pools)

    def new_blocks(self) -> list[Blocks]:
        """What a request begins with."""
        return [Blocks() for _ in self.groups]

    # ---- is there room

    def is_tight(self, count: int) -> bool:
        """Whether some group has fewer than `count` free blocks."""
        return min([pool.num_free for pool in self._pools]) < count

    def fits_next_tokens(self, holders: Iterable[Holder]) -> bool:
        """Whether one more token of each of `holders` finds its blocks."""
        missing = [0] * len(self._pools)
        for holder in holders:
            for index, size in enumerate(self._sizes):
                missing[index] += holder.num_computed_tokens >= len(holder.blocks[index].ids) * size
        return all(pool.num_free >= count for pool, count in zip(self._pools, missing, strict=True))

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

    # ---- blocks come and go

    def match(self, holder: Holder) -> Prefix:
        """The longest cached prefix. The last token is never part of it, since its logits are wanted."""
        if not self.caches_prefixes:
            return self.no_prefix()
        found = []
        for (pool, size), blocks in zip(self._pools_and_sizes, holder.blocks, strict=True):
            hash_full_blocks(blocks.hashes, holder.token_ids, size)
            found.append(pool.match(blocks.hashes[: (len(holder.token_ids) - 1) // size]))
        num_tokens = min(len(ids) * size for ids, size in zip(found, self._sizes, strict=True))
        while any(num_tokens % size for size in self._sizes):
            num_tokens = min(num_tokens - num_tokens % size for size in self._sizes)
        return Prefix([ids[: num_tokens // size] for ids, size in zip(found, self._sizes, strict=True)], num_tokens)

    def no_prefix(self) -> Prefix:
        """The prefix of a request that runs all of its tokens: none."""
        return Prefix([[] for _ in self._pools], 0)

    def start(self, holder: Holder, prefix: Prefix, num_tokens: int) -> None:
        """Give a request its prefix, and blocks for the `num_tokens` after it. The caller has asked `fits_start`."""
        for pool, size, blocks, cached in zip(self._pools, self._sizes, holder.blocks, prefix.ids, strict=True):
            pool.share(cached)
            blocks.ids = cached + pool.allocate(-(-(prefix.num_tokens + num_tokens) // size) - len(cached))
            blocks.num_published = len(cached)
        self._note_held(holder)
        self._note_published(holder)

    def grow(self, holder: Holder, num_tokens: int) -> tuple[int, list[list[int]] | None]:
        """Find blocks for a request's next `num_tokens` tokens, or for as many of them as there are.

        Returns how many tokens that is, 0 if none, and the new blocks of every group; None for these if the request
        had enough.
        """
        begin = holder.num_computed_tokens
        end = begin + num_tokens
        held = holder.num_held_tokens
        if end <= held:
            return num_tokens, None
        for (pool, size), blocks in zip(self._pools_and_sizes, holder.blocks, strict=True):
            if (room := (len(blocks.ids) + pool.num_free) * size) < end:
                end = room
        if end <= held:
            return max(0, end - begin), None
        taken: list[list[int]] = []
        held = self.num_tokens
        for (pool, size), blocks in zip(self._pools_and_sizes, holder.blocks, strict=True):
            ids = blocks.ids
            new = pool.allocate(-((len(ids) * size - end) // size))
            ids += new
            taken.append(new)
            if len(ids) * size < held:
                held = len(ids) * size
        holder.num_held_tokens = held
        return end - begin, taken

    def publish(self, holder: Holder) -> None:
        """Let full blocks of committed tokens be found by others, as soon as a step that writes them is scheduled."""
        if (num_tokens := holder.num_computed_tokens) < holder.num_to_publish or not self.caches_prefixes:
            return
        if len(holder.token_ids) < num_tokens and (num_tokens := len(holder.token_ids)) < holder.num_to_publish:
            return
        next_full = self.num_tokens + 1
        for (pool, size), blocks in zip(self._pools_and_sizes, holder.blocks, strict=True):
            num_full = num_tokens // size
            hash_full_blocks(blocks.hashes, holder.token_ids, size)
            for index in range(blocks.num_published, num_full):
                pool.publish(blocks.ids[index], blocks.hashes[index])
            blocks.num_published = num_full
            if (num_full + 1) * size < next_full:
                next_full = (num_full + 1) * size
        holder.num_to_publish = next_full

    def unpublish(self, holder: Holder, num_tokens: int) -> None:
        """Offer nothing to others that it has written after its first `num_tokens` tokens."""
        for pool, size, blocks in zip(self._pools, self._sizes, holder.blocks, strict=True):
            pool.unpublish(blocks.hashes[num_tokens // size :])

    def release(self, holder: Holder) -> None:
        """Take a request's blocks away. What is published can be found until its block is given out again."""
        for pool, blocks in zip(self._pools, holder.blocks, strict=True):
            pool.release(blocks.ids)
            blocks.ids, blocks.num_published = [], 0
        holder.num_held_tokens = holder.num_to_publish = 0

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the ranks' KV is gone or must not be trusted."""
        for pool in self._pools:
            pool.forget_prefixes()

    def _note_held(self, holder: Holder) -> None:
        holder.num_held_tokens = min(
            len(blocks.ids) * size for blocks, size in zip(holder.blocks, self._sizes, strict=True)
        )

    def _note_published(self, holder: Holder) -> None:
        holder.num_to_publish = min(
            (blocks.num_published + 1) * size for blocks, size in zip(holder.blocks, self._sizes, strict=True)
        )
