"""Who owns what: every unit has an owner, and shards are as equal as can be."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.parallel.sharding import shard, shard_columns, shard_heads


def test_eight_units_on_three_ranks() -> None:
    assert [len(shard(8, rank, 3)) for rank in range(3)] == [3, 3, 2]


@given(st.integers(1, 300), st.data())
def test_shards_cover_every_unit_once_and_differ_by_one_at_most(units: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, units))
    shards = [shard(units, rank, size) for rank in range(size)]
    assert [unit for own in shards for unit in own] == list(range(units))
    lengths = [len(own) for own in shards]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] <= 1


@given(st.integers(1, 3000), st.data())
def test_columns_are_cut_at_multiples_of_the_largest_block_that_fits(columns: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, columns))
    shards = [shard_columns(columns, rank, size) for rank in range(size)]
    assert [column for own in shards for column in own] == list(range(columns))
    assert all(len(own) for own in shards)
    if columns % 64 == 0 and columns // 64 >= size:
        assert all(own.start % 64 == 0 for own in shards)


def test_more_ranks_than_kv_heads_replicate_them_and_share_their_query_heads() -> None:
    heads = [shard_heads(6, 2, rank, 5) for rank in range(5)]
    assert [list(h.kv) for h in heads] == [[0], [0], [0], [1], [1]]
    assert [list(h.query) for h in heads] == [[0], [1], [2], [3, 4], [5]]


@given(st.integers(1, 8), st.integers(1, 8), st.data())
def test_each_query_head_has_one_owner_who_also_has_its_kv_head(kv_heads: int, group: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, kv_heads * group))
    heads = [shard_heads(kv_heads * group, kv_heads, rank, size) for rank in range(size)]
    assert [q for h in heads for q in h.query] == list(range(kv_heads * group))
    for h in heads:
        assert {q // group for q in h.query} == set(h.kv)
        assert len(h.query) % len(h.kv) == 0


def test_more_ranks_than_heads_are_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=r"tensor_parallel_size 10 .* 9 attention heads; use at most 9"):
        shard_heads(9, 3, 0, 10)


def test_a_rank_that_would_own_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="2 units cannot be shared by 3 ranks; use at most 2"):
        shard(2, 0, 3)
