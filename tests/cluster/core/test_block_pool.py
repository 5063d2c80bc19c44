"""The block pool against plain bookkeeping."""

from array import array

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from eagleray.cluster.core.block_pool import ROOT, BlockPool, hash_block

NUM_BLOCKS = 6


def test_block_hash_depends_on_its_tokens_and_on_all_before_them() -> None:
    first = hash_block(ROOT, array("i", [1, 2]))
    assert first == hash_block(ROOT, array("i", [1, 2]))
    assert first != hash_block(ROOT, array("i", [2, 1]))
    assert first != hash_block(first, array("i", [1, 2]))


def test_blocks_without_a_prefix_are_given_out_before_cached_ones_and_those_in_order_of_release() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    pool.publish(blocks[0], b"a")
    pool.publish(blocks[2], b"c")
    pool.release([blocks[2]])
    pool.release([blocks[0]])
    pool.release([blocks[1]])
    assert pool.allocate(3) == [blocks[1], blocks[2], blocks[0]]
    assert pool.match([b"a"]) == [] == pool.match([b"c"])


def test_a_requests_last_block_is_evicted_first() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(2)
    for block, key in zip(blocks, (b"a", b"ab"), strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match([b"a", b"ab"]) == [blocks[0]]


class PoolMachine(RuleBasedStateMachine):
    """Holders take, share, publish and give back; counts are compared with a plain list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.held: list[list[int]] = []
        self.published: dict[bytes, int] = {}  # the first block that was published with a hash, while it lives

    @rule(count=st.integers(1, 3))
    def take(self, count: int) -> None:
        if count <= self.pool.num_free:
            blocks = self.pool.allocate(count)
            assert all(block not in held for held in self.held for block in blocks)
            self.published = {key: block for key, block in self.published.items() if block not in blocks}
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), key=st.binary(min_size=1, max_size=1))
    def publish(self, data: st.DataObject, key: bytes) -> None:
        block = data.draw(st.sampled_from(data.draw(st.sampled_from(self.held))))
        if key not in self.published and block not in self.published.values():
            self.published[key] = block
            self.pool.publish(block, key)

    @rule(key=st.binary(min_size=1, max_size=1))
    def share(self, key: bytes) -> None:
        blocks = self.pool.match([key])
        assert blocks == ([self.published[key]] if key in self.published else [])
        in_use = {block for held in self.held for block in held}
        assert self.pool.num_free_among(blocks) == len(set(blocks) - in_use)
        if blocks:
            self.pool.share(blocks)
            self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.pool.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule()
    def forget(self) -> None:
        self.pool.forget_prefixes()
        self.published.clear()

    @invariant()
    def blocks_in_use_are_those_that_somebody_holds(self) -> None:
        in_use = {block for held in self.held for block in held}
        assert self.pool.num_used == len(in_use)
        assert self.pool.num_free == NUM_BLOCKS - len(in_use)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
