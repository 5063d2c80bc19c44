"""Paged decode attention: our kernel, FlashAttention-3 where it is installed, and the time that memory alone takes.

First checks our kernel against the plain implementation in float32. Then prints one JSON object per shape, with medians
in microseconds of one layer inside a CUDA graph; the graph goes over several caches in turn, together larger than the
L2 cache. `plan_us` comes once per step, not per layer. Needs a GPU.

Usage: python tests/bench/decode_attention.py [--tune] [--seconds LIMIT] [--out FILE]

`--tune` times many launch constants on every shape and prints the fastest, once with sections and once with chunks as
the splits of work; then those that are nowhere far from the fastest.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.context import (
    AttentionMetadata,
    ForwardContext,
    LayerCache,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.decode import (
    LaunchConstants,
    allocate_workspace,
    attend_planned,
    launch_constants,
    plan_decode,
)
from eagleray.workers.attention.reference import ReferenceBackend

BYTES_PER_SECOND = 4.3e12  # of a device copy on an H200
L2_BYTES = 50 << 20
BLOCK_SIZE = 128
HEADS = ((32, 8), (8, 2))  # 8B at TP 1 and TP 4
BATCHES = ((1, 1024), (8, 1024), (64, 1024), (256, 1024), (1, 8192), (32, 8192))
SECTIONS, ALL_CHUNKS = 0, 1 << 20  # for lanes: which splits the work is cut in
DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    batch: int
    context: int
    head_size: int = 128

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.heads, num_kv_heads=self.kv_heads, head_size=self.head_size, scale=self.head_size**-0.5
        )

    @property
    def kv_bytes(self) -> int:
        return 2 * 2 * self.batch * self.context * self.kv_heads * self.head_size


class Problem:
    """Queries and as many caches as do not fit into the L2 cache together; blocks are dealt at random."""

    def __init__(self, shape: Shape, seq_lens: Tensor | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, blocks = shape, -(-shape.context // BLOCK_SIZE)
        copies = max(2, -(-4 * L2_BYTES // shape.kv_bytes))
        num_blocks = shape.batch * blocks
        self.q = torch.randn(shape.batch, shape.heads, shape.head_size, dtype=dtype, device=DEVICE)
        size = (copies, 2, num_blocks, BLOCK_SIZE, shape.kv_heads, shape.head_size)
        self.caches = torch.empty(size, dtype=dtype, device=DEVICE)
        for cache in self.caches:
            cache.normal_()
        self.table = torch.randperm(num_blocks, device=DEVICE).int().view(shape.batch, blocks)
        full = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE)
        self.lens = full if seq_lens is None else seq_lens
        self.marks = torch.zeros(num_blocks, dtype=torch.int8, device=DEVICE)
        self.metadata = AttentionMetadata(
            query_start_loc=torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE),
            seq_lens=self.lens,
            slot_mapping=torch.empty(0, dtype=torch.int64, device=DEVICE),
            block_table=self.table,
            max_query_len=1,
            max_seq_len=shape.context,
        )

    def layer(self, cache: Tensor) -> PagedKVLayer:
        """One with such a cache, `[2, num_blocks, block_size, kv_heads, head_size]`; launches nothing."""
        return PagedKVLayer(self.metadata, LayerCache(cache, self.marks), self.shape.spec, ReferenceBackend())

    def ours(self, constants: LaunchConstants | None) -> tuple[Callable[[], None], Callable[[Tensor], Tensor]]:
        """The plan, and one layer's attention over a cache."""
        spec = self.shape.spec
        workspace = allocate_workspace(self.shape.batch, self.shape.context, spec, DEVICE, constants)

        def plan() -> None:
            plan_decode(workspace, self.lens, spec)

        def attend(cache: Tensor) -> Tensor:
            return attend_planned(self.q, self.layer(cache), workspace)

        plan()
        return plan, attend

    def flash_attention_3(self) -> Callable[[Tensor], Tensor] | None:
        try:
            from flash_attn_interface import flash_attn_with_kvcache
        except ImportError:
            return None
        q = self.q.unsqueeze(1)

        def attend(cache: Tensor) -> Tensor:
            out: Tensor = flash_attn_with_kvcache(
                q, cache[0], cache[1], cache_seqlens=self.lens, page_table=self.table, causal=True
            )
            return out

        return attend

    def reference(self, cache: Tensor) -> Tensor:
        layer = self.layer(cache.float())
        with forward_context(ForwardContext([layer])):
            return layer.backend(self.q.float(), layer)


def microseconds(attend: Callable[[Tensor], Any], caches: Tensor, replays: int = 9) -> float:
    """Median of one call, in a graph with a call for each cache or several."""
    calls = list(caches) * -(-16 // len(caches))
    for cache in caches[:2]:
        attend(cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for cache in calls:
            attend(cache)
    times = []
    for _ in range(replays + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    median: float = statistics.median(times[2:])
    return round(median, 2)


def check() -> bool:
    """Lengths of every kind, against float32; whether cutting the work in another way changes no bit."""
    generator = torch.Generator().manual_seed(time.time_ns())
    same = True
    for heads, kv_heads, head_size in ((32, 8, 128), (8, 2, 128), (8, 1, 64), (6, 2, 96), (8, 4, 256)):
        lens = torch.randint(1, 5000, (24,), generator=generator)
        lens[:6] = torch.tensor([1, 128, 129, 1024, 1025, 20000])
        problem = Problem(Shape(heads, kv_heads, 24, 20000, head_size), lens.int().to(DEVICE))
        expected, outs = problem.reference(problem.caches[0]), []
        for lanes in (SECTIONS, ALL_CHUNKS):
            _, attend = problem.ours(
                replace(launch_constants(problem.shape.spec, 24, problem.q.device), lanes=lanes, worth_cutting=0)
            )
            outs.append(attend(problem.caches[0]))
            torch.testing.assert_close(outs[-1].float(), expected, atol=1e-2, rtol=1.6e-2)
        error = (outs[0].float() - expected).abs().max().item()
        line = {"check": [heads, kv_heads, head_size], "largest_error": round(error, 5)}
        print(json.dumps(line | {"same_bits_however_cut": torch.equal(*outs)}), flush=True)
        same &= torch.equal(*outs)
        del problem, expected, outs, attend
    return same


def compare(shape: Shape) -> dict[str, Any]:
    problem = Problem(shape)
    plan, attend = problem.ours(None)
    result: dict[str, Any] = asdict(shape) | {"floor_us": round(shape.kv_bytes / BYTES_PER_SECOND * 1e6, 1)}
    result["ours_us"] = microseconds(attend, problem.caches)
    result["plan_us"] = microseconds(lambda _: plan(), problem.caches)
    if theirs := problem.flash_attention_3():
        result["fa3_us"] = microseconds(theirs, problem.caches)
    return result


def settings() -> list[LaunchConstants]:
    """The usual ones first."""
    compiled = ((64, 4, 3), (64, 4, 4), (128, 8, 2), (128, 8, 3), (32, 4, 4), (64, 2, 3), (128, 4, 2), (32, 2, 5))
    return [
        LaunchConstants(
            tile=tile, num_warps=warps, num_stages=stages, programs_per_sm=programs, lanes=fine, worth_cutting=0
        )
        for tile, warps, stages in compiled
        for programs in (3, 2, 4, 8, 1)
        for fine in (SECTIONS, ALL_CHUNKS)
    ]


def compile_all() -> None:
    """Ahead of the clock: one of each that needs compiling of its own."""
    for heads in HEADS:
        problem = Problem(Shape(*heads, 1, 1024))
        for constants in settings()[::10]:
            problem.ours(constants)[1](problem.caches[0])


def tune(shapes: list[Shape], seconds: float) -> Iterator[dict[str, Any]]:
    """Every shape gets an equal part of the time."""
    compile_all()
    found: dict[Shape, dict[LaunchConstants, float]] = {}
    start = time.monotonic()
    for done, shape in enumerate(shapes):
        problem, times = Problem(shape), found.setdefault(shape, {})
        limit = start + seconds * (done + 1) / len(shapes)
        for constants in settings():
            if time.monotonic() < limit:
                times[constants] = microseconds(problem.ours(constants)[1], problem.caches, replays=3)
        for name, fine in (("sections", SECTIONS), ("chunks", ALL_CHUNKS)):
            ranking = sorted((us, str(constants)) for constants, us in times.items() if constants.lanes == fine)
            yield asdict(shape) | {"splits": name, "tried": len(ranking), "best": ranking[:4]}
        del problem
    yield from everywhere(list(found.values()))


def everywhere(found: list[dict[LaunchConstants, float]]) -> Iterator[dict[str, Any]]:
    """The slowest shape of each setting, as a multiple of the fastest time, with the better cut for every shape."""
    slowness: dict[LaunchConstants, float] = {}
    for constants in set.intersection(*(set(times) for times in found)):
        other = replace(constants, lanes=ALL_CHUNKS if constants.lanes == SECTIONS else SECTIONS)
        if constants.lanes == SECTIONS and all(other in times for times in found):
            slowness[constants] = max(min(times[constants], times[other]) / min(times.values()) for times in found)
    for constants in sorted(slowness, key=slowness.__getitem__)[:6]:
        yield {"everywhere": str(constants), "slowest_shape": round(slowness[constants], 3)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--seconds", type=float, default=80, help="for --tune")
    parser.add_argument("--out", help="append the lines to this file, too")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(json.dumps({"skipped": "decode attention is measured on a GPU"}))
        return
    torch.manual_seed(time.time_ns() % 2**31)
    shapes = [Shape(*heads, *batch) for heads, batch in itertools.product(HEADS, BATCHES)]
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    same = check()
    results = tune(shapes, arguments.seconds) if arguments.tune else map(compare, shapes)
    for result in itertools.chain([about | {"block_size": BLOCK_SIZE, "dtype": "bfloat16"}], results):
        line = json.dumps(result)
        print(line, flush=True)
        if arguments.out:
            with open(arguments.out, "a") as file:
                file.write(line + "\n")
    if not same:
        sys.exit("sections and chunks give different bits")


if __name__ == "__main__":
    main()
