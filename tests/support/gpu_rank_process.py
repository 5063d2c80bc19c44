"""A tensor-parallel rank on a GPU of its own, as a process that runs the tasks below; see `rank_process`."""

import hashlib
import os
import sys
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.parallel.low_latency_reduce import MAX_ROWS, has_owners
from eagleray.workers.protocol.channel import Endpoint, Hub, Peer
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import Step, StepOutput
from eagleray.workers.rank import CUDA_ENVIRONMENT
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine
from support.mixed_requests import run_all
from support.rank_process import Tasks, serve

DEVICE = "cuda"
ROUNDS = 3  # sums one right after the other, which share a buffer
GREETING_S = 60.0
STEP_S = 120.0


def device_of(rank: int) -> torch.device:
    return torch.device(DEVICE, rank)


# ---- sums over ranks


Case = tuple[int, torch.dtype]  # how many numbers, of which type
Sums = list[tuple[str, float]]  # of each round: a digest of the sum, and its error as a share of what rounding explains


def sums(tp: TPGroup, cases: list[Case], in_graph: bool) -> list[Sums]:
    """Sums over the ranks, launched one by one, or captured in a graph and replayed."""
    add = graphed_sums if in_graph else eager_sums
    return [add(tp, numel, dtype) for numel, dtype in cases]


def eager_sums(tp: TPGroup, numel: int, dtype: torch.dtype) -> Sums:
    rounds = [draw(tp, numel, dtype, seed) for seed in range(ROUNDS)]
    totals = [sum_of(tp, inputs[tp.rank].clone(), seed) for seed, inputs in enumerate(rounds)]
    return [judge(total, inputs) for total, inputs in zip(totals, rounds, strict=True)]


def sum_of(tp: TPGroup, x: Tensor, index: int) -> Tensor:
    """Every second one in place."""
    return tp.all_reduce(x) if index % 2 == 0 else tp.add_up(x)


def graphed_sums(tp: TPGroup, numel: int, dtype: torch.dtype) -> Sums:
    """Captured once, and replayed with other numbers each time."""
    static = [torch.zeros(numel, dtype=dtype, device=device_of(tp.rank)) for _ in range(ROUNDS)]
    for x in static:
        tp.all_reduce(x)  # what is set up on first use must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        totals = [sum_of(tp, x, index) for index, x in enumerate(static)]
    results = []
    for replay in range(2):
        rounds = [draw(tp, numel, dtype, 10 * replay + seed) for seed in range(ROUNDS)]
        for x, inputs in zip(static, rounds, strict=True):
            x.copy_(inputs[tp.rank])
        graph.replay()
        results += [judge(total, inputs) for total, inputs in zip(totals, rounds, strict=True)]
    return results


def draw(tp: TPGroup, numel: int, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """What every rank puts in, on this rank's GPU."""
    generators = (torch.Generator().manual_seed(100 * seed + rank) for rank in range(tp.size))
    return [torch.randn(numel, generator=generator).to(device_of(tp.rank), dtype) for generator in generators]


def judge(total: Tensor, inputs: list[Tensor]) -> tuple[str, float]:
    """Each of `size - 1` additions is off by half a unit in the last place of a number below the sum of magnitudes."""
    exact, most = (sum(x.double() for x in terms) for terms in (inputs, [x.abs() for x in inputs]))
    allowed = (len(inputs) - 1) * torch.finfo(total.dtype).eps / 2 * most
    digest = hashlib.blake2b(total.contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
    return digest, float(((total.double() - exact).abs() / allowed).nan_to_num(0.0).max())


def gathers(tp: TPGroup, numel: list[int]) -> list[tuple[Tensor, ...]]:
    """This rank's random tensor of each size, what was gathered, the maximum, and what was exchanged."""
    results: list[tuple[Tensor, ...]] = []
    for n in numel:
        x = torch.randn(n, generator=torch.Generator().manual_seed(tp.rank)).to(device_of(tp.rank))
        exchanged = tp.all_to_all(torch.stack([x + rank for rank in range(tp.size)]))
        results.append((x.cpu(), tp.all_gather(x).cpu(), tp.all_reduce(x, "max").cpu(), exchanged.cpu()))
    return results


def norms(tp: TPGroup, shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[tuple[str, float, float]]:
    """Of each shape and replay of a graph: a digest of the norm, its error, and the error of this rank's sums.

    Errors are in units in the last place, the norm's of a number of at least 1.
    """
    results = []
    for rows, size in shapes:
        x = torch.zeros(rows, size, dtype=dtype, device=device_of(tp.rank))
        residual, weight = draw(tp, rows * size, dtype, 77)[0].view(rows, size), draw(tp, size, dtype, 78)[0]
        has_own = rows <= MAX_ROWS and has_owners(rows, size * dtype.itemsize, tp.size)
        own = slice(tp.rank, None, tp.size) if has_own else slice(None)
        tp.all_reduce_rms_norm(x, residual, weight, 1e-5)  # what is set up on first use must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            normed, total = tp.all_reduce_rms_norm(x, residual, weight, 1e-5)
        for replay in range(ROUNDS):
            parts = [part.view(rows, size) for part in draw(tp, rows * size, dtype, replay)]
            x.copy_(parts[tp.rank])
            graph.replay()
            exact = sum((part.double() for part in parts), residual.double())
            expected = F.rms_norm(exact, (size,), weight.double(), 1e-5)
            error = (normed.double() - expected).abs() / (expected.abs().clamp(min=1.0) * torch.finfo(dtype).eps)
            _, error_of_sums = judge(total[own], [*(part[own] for part in parts), residual[own]])
            results.append((judge(normed, [normed])[0], float(error.max()), error_of_sums))
    return results


def maxima_of_pairs(tp: TPGroup, numel: list[int]) -> list[tuple[Tensor, Tensor]]:
    """This rank's random pairs of each number, and the maximum."""
    results = []
    for n in numel:
        generator = torch.Generator().manual_seed(31 * n + tp.rank)
        x = torch.randint(-(2**63), 2**63 - 1, (n,), generator=generator)
        results.append((x, tp.all_reduce(x.to(device_of(tp.rank)), "max").cpu()))
    return results


# ---- all ranks run what one scheduler says


class Everybody:
    """A rank that sends each step to the others before it runs it itself."""

    def __init__(self, worker: Worker, hub: Hub, peers: list[bytes]) -> None:
        self._worker, self._hub, self._peers = worker, hub, peers
        self.digest = hashlib.blake2b()

    def run(self, step: Step) -> StepOutput:
        payload = msgspec.msgpack.encode(step)
        for peer in self._peers:
            self._hub.send(peer, payload)
        return run_step(self._worker, payload, self.digest)


def run_step(worker: Worker, payload: bytes, digest: Any) -> StepOutput:
    output = worker.run(msgspec.msgpack.decode(payload, type=Step))
    digest.update(msgspec.msgpack.encode(output))
    return output


def many_requests(tp: TPGroup, config: WorkerConfig, num_blocks: int, count: int) -> dict[str, Any]:
    """Rank 0 schedules `count` mixed requests; every rank returns a digest of all outputs of its own."""
    device = device_of(tp.rank)
    model = load_model(
        config.model, tp=tp, dtype=getattr(torch, config.dtype), device=device, load_format=config.load_format
    )
    worker = Worker(config, model, tp, num_blocks)
    if tp.rank > 0:
        return {"digest": follow(tp, worker, device)}
    hub = Hub()
    names = [b"rank %d" % rank for rank in range(1, tp.size)]
    share_endpoint(tp, hub.endpoint, device)
    greeted: set[bytes] = set()
    while greeted < set(names):
        assert hub.socket.poll(int(GREETING_S * 1000)), "a rank did not greet"
        if greeting := hub.receive():
            greeted.add(greeting[0])
    rank = Everybody(worker, hub, names)
    scheduler = Scheduler(
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
    result = run_all(InlineEngine(scheduler, rank, depth=2), count, model.config.vocab_size)
    for name in names:
        hub.send(name, b"")
    hub.close()
    return {"digest": rank.digest.hexdigest(), **result}


def follow(tp: TPGroup, worker: Worker, device: torch.device) -> str:
    """Run rank 0's steps until it says goodbye."""
    hub = Peer(share_endpoint(tp, None, device), b"rank %d" % tp.rank)
    hub.send(b"")
    digest = hashlib.blake2b()
    while payload := hub.receive(STEP_S):
        run_step(worker, payload, digest)
    assert payload is not None, "rank 0 fell silent"
    hub.close()
    return digest.hexdigest()


def share_endpoint(tp: TPGroup, endpoint: Endpoint | None, device: torch.device) -> Endpoint:
    """Rank 0's endpoint, on every rank."""
    message = b"" if endpoint is None else msgspec.msgpack.encode(endpoint)
    padded = torch.tensor([len(message), *message.ljust(250)], device=device)
    length, *content = tp.all_gather(padded)[0].tolist()
    return msgspec.msgpack.decode(bytes(content[:length]), type=Endpoint)


TASKS: Tasks = {task.__name__: task for task in (sums, gathers, norms, maxima_of_pairs, many_requests)}


if __name__ == "__main__":
    os.environ.update(CUDA_ENVIRONMENT)
    torch.cuda.set_device(int(sys.argv[2]))
    serve(sys.argv[1], int(sys.argv[2]), TASKS, device_of(int(sys.argv[2])))
