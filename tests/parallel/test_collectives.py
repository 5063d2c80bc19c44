"""Collectives among real processes over gloo, and what a group does without one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from eagleray.parallel.group import TPGroup

pytestmark = pytest.mark.slow  # processes of several ranks

RunRanks = Callable[..., list[Any]]

NUMEL = [1, 3, 576, 16 * 1024 + 1, 200_001]  # below and above what goes in one message


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums_maxima_gathering_and_exchange(size: int, run_ranks: RunRanks) -> None:
    results = run_ranks("collectives", size, numel=NUMEL)
    for n, per_rank in zip(NUMEL, zip(*results, strict=True), strict=True):
        inputs = torch.stack([torch.randn(n, generator=torch.Generator().manual_seed(rank)) for rank in range(size)])
        total = inputs[0].clone()
        for other in inputs[1:]:
            total += other
        for rank, result in enumerate(per_rank):  # bitwise, in order of rank, whatever the size of the message
            assert torch.equal(result["sum"], total)
            assert torch.equal(result["max"], inputs.amax(0))
            assert torch.equal(result["gathered"], inputs)
            assert torch.equal(result["exchanged"], inputs + rank)


@pytest.mark.slow
def test_collectives_are_traced_into_one_graph(run_ranks: RunRanks) -> None:
    for compiled, eager in run_ranks("compiled_collectives", 2):
        assert torch.equal(compiled, eager)


def test_a_group_of_one_never_communicates() -> None:
    x = torch.arange(3.0)
    assert TPGroup().all_reduce(x) is x
    assert torch.equal(TPGroup().all_gather(x), x.unsqueeze(0))
    assert TPGroup().all_to_all(x.unsqueeze(0)).equal(x.unsqueeze(0))


def test_a_shard_without_a_process_group_cannot_communicate() -> None:
    with pytest.raises(RuntimeError, match="no process group"):
        TPGroup(rank=1, size=4).all_reduce(torch.ones(2))


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ValueError, match="no rank 4 in a group of 4"):
        TPGroup(rank=4, size=4)
