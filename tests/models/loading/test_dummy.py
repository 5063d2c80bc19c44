"""Weights made up for a region are those of the whole tensor there, whatever its shape."""

from unittest.mock import patch

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eagleray.models.loading import dummy
from eagleray.parallel.weight_shard import WeightShard


def made_up(shape: tuple[int, ...], region: tuple[slice, ...]) -> Tensor:
    target = torch.full([cut.stop - cut.start for cut in region], float("nan"))
    dummy.fill("x", WeightShard(name="x", shape=shape, region=region, target=target, mean=0.5), seed=3)
    return target


@given(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 60), st.data())
def test_any_region_of_any_number_of_dimensions(dims: list[int], chunk: int, data: st.DataObject) -> None:
    shape = tuple(dims)
    whole = made_up(shape, tuple(slice(0, size) for size in shape))
    starts = [data.draw(st.integers(0, size)) for size in shape]
    region = tuple(slice(at, data.draw(st.integers(at, size))) for at, size in zip(starts, shape, strict=True))
    with patch.object(dummy, "_CHUNK", chunk):
        assert torch.equal(made_up(shape, region), whole[region])
    assert len(whole.unique()) == whole.numel()
