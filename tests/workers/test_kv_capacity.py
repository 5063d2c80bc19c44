"""What fits into a GPU's memory, and what a rank says when something does not."""

import pytest
import torch

from eagleray.workers.graphs.decode import batch_sizes
from eagleray.workers.kv_capacity import graph_bytes, probe_sizes
from eagleray.workers.out_of_memory import explained, is_out_of_memory

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 8, 100, 256, 1000])
def test_three_graphs_tell_what_all_take(max_rows: int) -> None:
    sizes = batch_sizes(max_rows)
    taken = {size: 3 * MIB + size * 250_000 for size in sizes}  # launches, and a line of results per row
    taken[max(sizes)] += 700 * MIB  # the room in which all of them work
    probed = {size: taken[size] for size in probe_sizes(sizes)}
    assert len(probed) <= 3
    assert graph_bytes(sizes, probed) == pytest.approx(sum(taken.values()), rel=1e-6)


def test_memory_that_ran_out_is_explained_with_what_was_asked_for() -> None:
    with (
        pytest.raises(MemoryError, match=r"cpu has no memory left for the KV cache \(\d+ bytes more .*; use less$"),
        explained("the KV cache", "use less", CPU),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), explained("a step", "use less", CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected
