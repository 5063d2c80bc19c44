"""Cuts a tensor of any shape into parts of a bounded size, so that it is read or made up with little memory."""

from collections.abc import Iterator
from math import prod


def parts(shape: tuple[int, ...], limit: int) -> Iterator[tuple[slice, ...]]:
    """Regions of at most `limit` values, in order, that together are a tensor of `shape`. `limit` is 1 or more."""
    if prod(shape) <= limit:
        yield tuple(slice(0, size) for size in shape)
        return
    each = max(1, limit // prod(shape[1:]))  # of the first dimension
    for start in range(0, shape[0], each):
        first = slice(start, min(start + each, shape[0]))
        yield from ((first, *others) for others in parts(shape[1:], limit // (first.stop - first.start)))
