"""Sums, norms and maxima over ranks by inboxes: processes in Triton's interpreter that share memory, as GPUs would."""

import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.interpreter import INTERPRETED
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

SIZES = (3, 2)  # of groups, one after the other
AT_ONCE, MAX_ROWS, SIZE = 3, 8, 96  # rows of a sum that are sent to all, and that may be; numbers in a row
ROWS = [3, 3, 1, 7, 7, 2, 8, 8, 3]  # of one call after the other
PAIRS = [1, 200, 128, 7]
EPS = 1e-5


def random(rank: int, call: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 * call + rank)).half()


def random_pairs(rank: int, call: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)


def residual_of(call: int) -> Tensor | None:
    return None if call == 0 or ROWS[call] != ROWS[call - 1] else random(99, call, ROWS[call], SIZE)


def run_rank(rank: int, memory: dict[int, list[list[Tensor]]], results: Any) -> None:
    """Of each group that has this rank, which are by their sizes in `memory`."""
    from eagleray.parallel import low_latency_reduce

    low_latency_reduce.MAX_ROWS_AT_ONCE, low_latency_reduce.MAX_ROWS = AT_ONCE, MAX_ROWS
    for size, of_group in memory.items():
        if rank < size:
            results.put((size, rank, *run_calls(rank, of_group)))


def run_calls(rank: int, memory: list[list[Tensor]]) -> tuple[list[Any], list[Any]]:
    """Every call in turn; `memory` holds the inboxes of all ranks, for sums and for pairs."""
    from eagleray.parallel import low_latency_reduce

    def inboxes(own: list[Tensor], lines: int, words: int) -> low_latency_reduce.Inboxes:
        pointers = torch.tensor([tensor.data_ptr() for tensor in own])
        epochs = torch.zeros(max(lines, MAX_ROWS), dtype=torch.int32)
        return low_latency_reduce.Inboxes(rank, len(own), lines, words, own[rank], pointers, epochs)

    for_sums = inboxes(memory[0], low_latency_reduce.lines_of_sums(len(memory[0])), SIZE // 2)
    for_pairs = inboxes(memory[1], *low_latency_reduce.lines_of_pairs(max(PAIRS)))
    weight = random(98, 0, SIZE)
    outs = []
    for call, rows in enumerate(ROWS):
        normed, total = low_latency_reduce.all_reduce_rms_norm(
            for_sums, random(rank, call, rows, SIZE), residual_of(call), weight, EPS
        )
        outs.append((normed.clone().numpy(), total.clone().numpy()))
    best = [low_latency_reduce.highest(for_pairs, random_pairs(rank, call, n)).numpy() for call, n in enumerate(PAIRS)]
    return outs, best


def run_all() -> dict[int, list[tuple[list[Any], list[Any]]]]:
    """What each rank of each group has got. Processes are those of the largest, since torch takes them seconds."""
    from eagleray.parallel.low_latency_reduce import lines_of_pairs

    lines, words = lines_of_pairs(max(PAIRS))
    memory = {}
    for size in SIZES:
        shapes = (2 * size * (AT_ONCE + 2 * MAX_ROWS) * SIZE // 2, 2 * size * lines * words)  # room enough
        memory[size] = [[torch.zeros(n, dtype=torch.int64).share_memory_() for _ in range(size)] for n in shapes]
    spawn = multiprocessing.get_context("spawn")
    results: Any = spawn.Queue()
    processes = [spawn.Process(target=run_rank, args=(rank, memory, results)) for rank in range(max(SIZES))]
    for process in processes:
        process.start()
    got = sorted((results.get(timeout=120) for _ in range(sum(SIZES))), key=lambda result: result[:2])
    for process in processes:
        process.join(timeout=30)
    return {size: [(outs, best) for its_size, _, outs, best in got if its_size == size] for size in SIZES}


if not INTERPRETED:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:

    def test_programs_have_a_number_of_warps_that_triton_takes() -> None:
        from eagleray.parallel.low_latency_reduce import num_warps

        assert {num_warps(hidden) for hidden in range(64, 16385, 64)} == {4, 8, 16}

    @pytest.fixture(scope="module")
    def of_groups() -> dict[int, list[tuple[list[Any], list[Any]]]]:
        return run_all()

    @pytest.mark.parametrize("size", SIZES)
    def test_sums_norms_and_maxima(of_groups: dict[int, list[tuple[list[Any], list[Any]]]], size: int) -> None:
        of_ranks = of_groups[size]
        assert len(of_ranks) == size
        weight = random(98, 0, SIZE).float()
        for call, rows in enumerate(ROWS):
            total = sum((random(rank, call, rows, SIZE).float() for rank in range(size)), torch.zeros(rows, SIZE))
            residual = residual_of(call)
            kept = (total if residual is None else total + residual.float()).half()
            normed = F.rms_norm(kept.float(), (SIZE,), weight, EPS)
            for rank, (outs, _) in enumerate(of_ranks):
                torch.testing.assert_close(torch.from_numpy(outs[call][0]).float(), normed, atol=4e-3, rtol=2e-3)
                own = slice(rank, None, size) if rows > AT_ONCE else slice(None)  # rows whose sum this rank keeps
                assert torch.equal(torch.from_numpy(outs[call][1])[own], kept[own])
                assert (outs[call][0] == of_ranks[0][0][call][0]).all(), "ranks have other bits"
        for call, n in enumerate(PAIRS):
            expected = torch.stack([random_pairs(rank, call, n) for rank in range(size)]).amax(dim=0)
            for _, best in of_ranks:
                assert torch.equal(torch.from_numpy(best[call]), expected)
