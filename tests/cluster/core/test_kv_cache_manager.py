"""The KV cache of several groups against a table of what is written in every slot of every block."""

from array import array
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.cluster.core.kv_cache_manager import Blocks, KVCacheManager, KVGroup

GROUPS = [KVGroup(num_blocks=12, block_size=2), KVGroup(num_blocks=9, block_size=3)]


@dataclass
class Sequence:
    token_ids: "array[int]"
    blocks: list[Blocks]
    num_computed_tokens: int = 0
    num_held_tokens: int = 0
    num_to_publish: int = 0


class Cache:
    """Writes, as ranks would, all tokens up to a slot into that slot."""

    def __init__(self, groups: list[KVGroup]) -> None:
        self.manager = KVCacheManager(groups)
        self.groups = groups
        self.slots: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.running: list[Sequence] = []

    def start(self, token_ids: list[int]) -> int | None:
        """The length of the prefix that was found; None if the sequence does not fit."""
        sequence = Sequence(array("i", token_ids), self.manager.new_blocks())
        prefix = self.manager.match(sequence)
        num_tokens = len(token_ids) - prefix.num_tokens
        if not self.manager.fits_start(prefix, num_tokens, keep_headroom=False):
            return None
        self.manager.start(sequence, prefix, num_tokens)
        for place in range(prefix.num_tokens):  # what was computed by others is what this one would compute
            for group in range(len(self.groups)):
                assert self.slots[self.slot(sequence, group, place)] == tuple(token_ids[: place + 1])
        sequence.num_computed_tokens = prefix.num_tokens
        self.compute(sequence, num_tokens)
        self.running.append(sequence)
        return prefix.num_tokens

    def grow(self, sequence: Sequence, token_ids: list[int]) -> None:
        """As many of these tokens as find room in every group; no more than those take blocks."""
        used = [
            {block for each in self.running for block in each.blocks[index].ids} for index in range(len(self.groups))
        ]
        room = min(
            (len(sequence.blocks[index].ids) + group.num_blocks - len(used[index])) * group.block_size
            for index, group in enumerate(self.groups)
        )
        held = [list(blocks.ids) for blocks in sequence.blocks]
        num_tokens, new = self.manager.grow(sequence, len(token_ids))
        assert num_tokens == min(len(token_ids), room - sequence.num_computed_tokens)
        sequence.token_ids.extend(token_ids[:num_tokens])
        for group, before, taken, blocks in zip(
            self.groups, held, new or [[] for _ in held], sequence.blocks, strict=True
        ):
            assert before + taken == blocks.ids
            assert len(blocks.ids) == -(-len(sequence.token_ids) // group.block_size)
        if num_tokens:
            self.compute(sequence, num_tokens)

    def compute(self, sequence: Sequence, num_tokens: int) -> None:
        begin = sequence.num_computed_tokens
        sequence.num_computed_tokens += num_tokens
        for place in range(begin, sequence.num_computed_tokens):
            for group in range(len(self.groups)):
                self.slots[self.slot(sequence, group, place)] = tuple(sequence.token_ids[: place + 1])
        self.manager.publish(sequence)

    def end(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.manager.release(sequence)

    def slot(self, sequence: Sequence, group: int, place: int) -> tuple[int, int, int]:
        size = self.groups[group].block_size
        return group, sequence.blocks[group].ids[place // size], place % size

    def check(self) -> None:
        for sequence in self.running:
            for place in range(sequence.num_computed_tokens):
                for group in range(len(self.groups)):
                    written = self.slots[self.slot(sequence, group, place)]
                    assert written == tuple(sequence.token_ids[: place + 1]), "another request wrote there"
        held = [
            {block for each in self.running for block in each.blocks[group].ids} for group in range(len(self.groups))
        ]
        assert self.manager.num_used == sum(map(len, held))


TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=14)


@given(st.data())
def test_nobody_loses_what_is_his_and_a_prefix_holds_what_it_should(data: st.DataObject) -> None:
    cache = Cache(GROUPS)
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["start", "grow", "end"]))
        if action == "start":
            cache.start(data.draw(TOKENS))
        elif cache.running:
            sequence = data.draw(st.sampled_from(cache.running))
            cache.end(sequence) if action == "end" else cache.grow(sequence, data.draw(TOKENS))
        cache.check()
    for sequence in list(cache.running):
        cache.end(sequence)
    assert cache.manager.num_used == 0


def test_a_prefix_is_as_long_as_all_groups_hold_it() -> None:
    """Blocks of 2 and of 3: the first six tokens are the most that both hold of eleven, the last of which must run."""
    cache = Cache(GROUPS)
    assert cache.start(list(range(11))) == 0
    cache.end(cache.running[0])
    assert cache.start(list(range(11))) == 6


@pytest.mark.parametrize("groups", [GROUPS, GROUPS[:1]], ids=["two groups", "one group"])
def test_what_was_not_finite_is_found_no_more(groups: list[KVGroup]) -> None:
    cache = Cache(groups)
    cache.start([1] * 13)
    cache.manager.unpublish(cache.running[0], 6)
    cache.end(cache.running[0])
    assert cache.start([1] * 13) == 6


def test_headroom_is_for_those_who_run() -> None:
    manager = KVCacheManager([KVGroup(num_blocks=4, block_size=2)])
    sequence = Sequence(array("i", [1] * 8), manager.new_blocks())
    prefix = manager.match(sequence)
    assert manager.fits_start(prefix, 8, keep_headroom=False)
    assert not manager.fits_start(prefix, 8, keep_headroom=True)
    assert manager.fits_start(prefix, 6, keep_headroom=True)
