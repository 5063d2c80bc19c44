"""Paged attention over chunks: our kernel, FlashAttention-3 where it serves the layer, and the plain implementation.

First checks our kernel against the plain implementation in float32. Then prints one JSON object per batch, with medians
in microseconds of one layer, and what ours makes of the multiplications that the visible keys ask for. Needs a GPU.

Usage: python tests/bench/varlen_attention.py [--tune] [--out FILE]

`--tune` times many launch constants on every batch and prints the fastest.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import triton
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.context import (
    AttentionBackend,
    AttentionMetadata,
    ForwardContext,
    LayerCache,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.flash import FlashBackend
from eagleray.workers.attention.reference import ReferenceBackend
from eagleray.workers.attention.varlen import LaunchConstants, VarlenBackend, launch_constants

BLOCK_SIZE = 128
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
LLAMA = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=128, scale=128**-0.5)  # 8B
GEMMA = AttentionSpec(num_heads=16, num_kv_heads=8, head_size=256, scale=256**-0.5, logits_soft_cap=50.0)  # 9B
SPECS = {"llama": LLAMA, "gemma": GEMMA, "gemma, window": replace(GEMMA, sliding_window=4096)}
BATCHES = {  # requests as (tokens in the batch, tokens of the request)
    "4 x 2048": [(2048, 2048)] * 4,
    "1 x 8192": [(8192, 8192)],
    "1 x 2048 after 6144": [(2048, 8192)],
    "64 of 1 after 2047, 1 x 1024": [(1, 2048)] * 64 + [(1024, 1024)],
}


@dataclass(frozen=True)
class Problem:
    """A batch with its cache, whose blocks are dealt at random."""

    spec: AttentionSpec
    lengths: list[tuple[int, int]]
    q: Tensor
    cache: Tensor
    metadata: AttentionMetadata

    @classmethod
    def random(cls, spec: AttentionSpec, lengths: list[tuple[int, int]]) -> "Problem":
        blocks = max(-(-seq_len // BLOCK_SIZE) for _, seq_len in lengths)
        table = torch.randperm(len(lengths) * blocks, device=DEVICE).int().view(len(lengths), blocks)
        starts = [0, *accumulate(n for n, _ in lengths)]
        size = (2, table.numel(), BLOCK_SIZE, spec.num_kv_heads, spec.head_size)
        metadata = AttentionMetadata(
            query_start_loc=torch.tensor(starts, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32, device=DEVICE),
            slot_mapping=torch.empty(0, dtype=torch.int64, device=DEVICE),
            block_table=table,
            max_query_len=max(n for n, _ in lengths),
            max_seq_len=max(seq_len for _, seq_len in lengths),
        )
        q = torch.randn(starts[-1], spec.num_heads, spec.head_size, dtype=BF16, device=DEVICE)
        return cls(spec, lengths, q, torch.randn(size, dtype=BF16, device=DEVICE), metadata)

    def attention(self, backend: AttentionBackend) -> Callable[[], Tensor]:
        """One layer's attention, in a forward pass of its own each time."""
        marks = torch.zeros(self.cache.shape[1], dtype=torch.int8, device=DEVICE)
        layer = PagedKVLayer(self.metadata, LayerCache(self.cache, marks), self.spec, backend)
        context = ForwardContext([layer])

        def attend() -> Tensor:
            with forward_context(context):
                return backend(self.q, layer)

        return attend

    @property
    def operations(self) -> int:
        """Multiplications and additions of both products, over the keys that are seen."""
        window = self.spec.sliding_window or self.metadata.max_seq_len
        seen = sum(min(i + 1, window) for n, seq_len in self.lengths for i in range(seq_len - n, seq_len))
        return 4 * seen * self.spec.num_heads * self.spec.head_size

    def largest_error(self) -> float:
        """Of our kernel, against the plain implementation in float32; raises if it is more than rounding."""
        expected = replace(self, q=self.q.float(), cache=self.cache.float()).attention(ReferenceBackend())()
        out = self.attention(VarlenBackend())().float()
        torch.testing.assert_close(out, expected, atol=1e-2, rtol=1.6e-2)
        return round((out - expected).abs().max().item(), 5)


def microseconds(call: Callable[[], Any], seconds: float = 0.3) -> float:
    """Median of one call, several after each other, so that the host is ahead of the GPU."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    calls = max(1, min(20, int(0.01 / (time.perf_counter() - begin))))
    times: list[float] = []
    limit = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < limit and len(times) < 30):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return round(statistics.median(times), 1)


def compare(layer: str, batch: str) -> dict[str, Any]:
    problem = Problem.random(SPECS[layer], BATCHES[batch])
    result: dict[str, Any] = {"layer": layer, "batch": batch, "largest_error": problem.largest_error()}
    result["ours_us"] = microseconds(problem.attention(VarlenBackend()))
    result["ours_tflops"] = round(problem.operations / result["ours_us"] / 1e6, 1)
    if FlashBackend().supports(problem.spec, BF16, DEVICE):
        result["fa3_us"] = microseconds(problem.attention(FlashBackend()))
        result["share_of_fa3"] = round(result["fa3_us"] / result["ours_us"], 3)
    else:
        result["plain_us"] = microseconds(problem.attention(ReferenceBackend()))
    return result


SETTINGS = [
    LaunchConstants(rows=rows, tile=tile, num_warps=warps, num_stages=stages)
    for rows, tile, warps, stages in (
        *((128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2), (128, 32, 8, 3), (128, 32, 8, 4)),
        *((64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (64, 32, 4, 3), (64, 32, 4, 4), (64, 128, 4, 2)),
    )
]


def tune(layer: str, batch: str) -> dict[str, Any]:
    """The fastest settings. Those that the GPU's shared memory cannot hold are left out, and counted."""
    problem, times = Problem.random(SPECS[layer], BATCHES[batch]), {}
    for constants in SETTINGS:
        try:
            times[constants] = microseconds(problem.attention(VarlenBackend(constants)), seconds=0.05)
        except triton.runtime.OutOfResources:
            continue
    ranking = sorted(times, key=times.__getitem__)[:5]
    usual = times.get(launch_constants(problem.spec.head_size, problem.q.device))
    best = [asdict(constants) | {"us": times[constants]} for constants in ranking]
    return {"layer": layer, "batch": batch, "usual_us": usual, "best": best, "too_large": len(SETTINGS) - len(times)}


def lines(tuned: bool) -> Iterator[dict[str, Any]]:
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    yield about | {"block_size": BLOCK_SIZE, "dtype": "bfloat16"}
    for layer, batch in itertools.product(SPECS, BATCHES):
        yield tune(layer, batch) if tuned else compare(layer, batch)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", help="append the lines to this file, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "attention over chunks is measured on a GPU"}))
        return
    torch.manual_seed(time.time_ns() % 2**31)
    for result in lines(arguments.tune):
        line = json.dumps(result)
        print(line, flush=True)
        if arguments.out:
            with open(arguments.out, "a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    main()
