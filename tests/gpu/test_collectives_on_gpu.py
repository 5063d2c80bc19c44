"""Sums over GPUs: the same bits on all ranks, and no further from the exact sum than rounding explains.

Sizes lie on both sides of every threshold in `parallel/symmetric_memory.py`: where one shot becomes two, where NCCL
takes over, and where a message cannot be cut into words for each rank.
"""

from collections.abc import Callable

import pytest
import torch

from eagleray.parallel.symmetric_memory import MAX_BYTES, ONE_SHOT_BYTES
from support.gpu import needs_gpus
from support.rank_pool import RunRanks

pytestmark = needs_gpus(2)

SIZES = [pytest.param(size, marks=needs_gpus(size)) for size in (2, 4)]
NUM_BYTES = [4, 252, 256, 260, 8192, ONE_SHOT_BYTES - 256, ONE_SHOT_BYTES, ONE_SHOT_BYTES + 256]
NUM_BYTES += [2**20 + 4, MAX_BYTES - 256, MAX_BYTES, MAX_BYTES + 256]


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CASES = [(num_bytes // dtype.itemsize, dtype) for num_bytes in NUM_BYTES for dtype in DTYPES]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "in a graph"])
def test_sums(run_gpu_ranks: RunRanks, size: int, in_graph: bool, say: Callable[[str], None]) -> None:
    errors = []
    for case, *of_ranks in zip(CASES, *run_gpu_ranks("sums", size, cases=CASES, in_graph=in_graph), strict=True):
        digests = [[digest for digest, _ in rounds] for rounds in of_ranks]
        assert all(of_rank == digests[0] for of_rank in digests), f"{case}: ranks have other bits"
        assert len(set(digests[0])) == len(digests[0]), f"{case}: a sum was taken for another"
        errors.append((max(error for rounds in of_ranks for _, error in rounds), case))
    say(f"greatest error, as a share of what rounding explains: {max(errors, key=lambda e: e[0])}")
    assert max(errors, key=lambda e: e[0])[0] <= 1.01  # the bound leaves out errors of errors


@pytest.mark.parametrize("size", SIZES)
def test_what_is_gathered_and_exchanged_and_maxima(run_gpu_ranks: RunRanks, size: int) -> None:
    of_ranks = run_gpu_ranks("gathers", size, numel=[1, 63, 64, 5000, 300_000])
    for at_one_size in zip(*of_ranks, strict=True):
        whole = torch.stack([x for x, *_ in at_one_size])
        for rank, (_, gathered, highest, exchanged) in enumerate(at_one_size):
            assert torch.equal(gathered, whole)
            assert torch.equal(exchanged, whole + rank)
            assert torch.equal(highest, whole.amax(dim=0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_that_are_normed(run_gpu_ranks: RunRanks, size: int, dtype: torch.dtype) -> None:
    """Rows on both sides of what is sent to all, and of what one launch takes."""
    shapes = [
        (rows, hidden) for hidden in (576, 2560, 3584, 4096, 5120, 8192) for rows in (1, 3, 20, 64, 65, 256, 512, 513)
    ]
    of_ranks = run_gpu_ranks("norms", size, shapes=shapes, dtype=dtype)
    for of_rank in zip(*of_ranks, strict=True):
        assert len({digest for digest, _, _ in of_rank}) == 1, "ranks have other bits"
        assert all(error <= 8 for _, error, _ in of_rank)
        assert all(error <= 1.01 for _, _, error in of_rank)


@pytest.mark.parametrize("size", SIZES)
def test_maxima_of_pairs(run_gpu_ranks: RunRanks, size: int) -> None:
    of_ranks = run_gpu_ranks("maxima_of_pairs", size, numel=[1, 127, 128, 129, 512, 8192, 8193])
    for at_one_size in zip(*of_ranks, strict=True):
        whole = torch.stack([x for x, _ in at_one_size])
        assert all(torch.equal(highest, whole.amax(dim=0)) for _, highest in at_one_size)
