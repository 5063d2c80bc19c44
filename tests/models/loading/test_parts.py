"""Parts of a tensor are small, in order, and together the tensor."""

from math import prod

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eagleray.models.loading.parts import parts


@given(st.lists(st.integers(0, 6), max_size=4), st.integers(1, 60))
def test_every_value_is_in_one_part_in_order(dims: list[int], limit: int) -> None:
    values = np.arange(prod(dims)).reshape(dims)
    cut = [values[region] for region in parts(tuple(dims), limit)]
    assert [value for part in cut for value in part.flat] == list(range(prod(dims)))
    assert all(part.size <= limit for part in cut)
    assert all(part.ndim == len(dims) for part in cut)


def test_parts_are_as_large_as_they_may_be_in_whole_rows() -> None:
    assert [region[0] for region in parts((7, 10), 35)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(parts((2, 3, 10), 20)) == [
        (slice(expert, expert + 1), rows, slice(0, 10)) for expert in (0, 1) for rows in (slice(0, 2), slice(2, 3))
    ]
