"""The pool of KV blocks: reference counts, the prefix cache and eviction."""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

ROOT = b""


def hash_block(parent: bytes, token_ids: "array[int]") -> bytes:
    """Name a full block by its tokens and, through `parent` (the hash before it, or `ROOT`), by all before them."""
    return blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class BlockPool:
    """Reference counts and the prefix cache of `num_blocks` blocks.

    A block whose count falls to zero is free. It keeps its hash, and so can be found again, until it is given out anew;
    blocks without a hash go first, then the one freed longest ago.
    """

    def __init__(self, num_blocks: int) -> None:
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._cached: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to be given out first

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Give out `count` free blocks with one reference each; the caller has looked at `num_free`."""
        assert count <= len(self._free)
        blocks = []
        for _ in range(count):
            block, _ = self._free.popitem(last=False)
            if self._hashes[block] is not None:
                self._forget(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """Find the longest run of cached blocks that begins a request; no reference is taken."""
        blocks = []
        for key in hashes:
            block = self._cached.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_free_among(self, blocks: Sequence[int]) -> int:
        return sum(self._ref_counts[block] == 0 for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each block, free or in use."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._free[block]
            self._ref_counts[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Let a full block be found by its hash. If another block has that hash already, that one stays."""
        if key not in self._cached:
            self._forget(block)
            self._cached[key] = block
            self._hashes[block] = key

    def unpublish(self, keys: Iterable[bytes]) -> None:
        """Forget these hashes, as far as they are known: no block is found by them any more."""
        for key in keys:
            if (block := self._cached.get(key)) is not None:
                self._forget(block)

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a request, given in order: its last blocks are evicted first."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            assert self._ref_counts[block] >= 0, f"block {block} was released too often"
            if self._ref_counts[block] == 0:
                self._free[block] = None
                if self._hashes[block] is None:
                    self._free.move_to_end(block, last=False)

    def forget_prefixes(self) -> None:
        """Empty the prefix cache: the ranks' KV is gone or must not be trusted."""
        for block in list(self._cached.values()):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._hashes[block]
        if key is not None:
            del self._cached[key]
            self._hashes[block] = None
