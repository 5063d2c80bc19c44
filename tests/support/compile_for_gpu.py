"""Compiles for a GPU that need not be here whatever launches kernels, and prints their names. Started by path.

A launch only compiles: so what is called with tensors in host memory launches all that it would, and computes nothing.
"""
# ruff: noqa: E402  what is imported asks at once whether there is a GPU

from collections.abc import Callable
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

CAPABILITY = (9, 0)
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *device: CAPABILITY

from eagleray.models import kernels as model_kernels
from eagleray.models.attention import AttentionSpec
from eagleray.parallel import low_latency_reduce, skinny
from eagleray.workers import row_kernels
from eagleray.workers.attention import decode, kv_kernels
from eagleray.workers.attention.varlen import VarlenBackend
from eagleray.workers.protocol.messages import Sampling
from eagleray.workers.sampling.kernel_sampler import KernelSampler
from eagleray.workers.sampling.kernels import best_plain_pairs
from eagleray.workers.sampling.table import SamplingTable
from support.attention_requests import Requests
from support.decode_batch import DecodeBatch

CPU, BF16 = torch.device("cpu"), torch.bfloat16
HEADS, KV_HEADS, VOCAB, BLOCK = 32, 8, 128_256, 128


class Driver:
    """What Triton asks before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)


def spec(head_size: int, **others: Any) -> AttentionSpec:
    return AttentionSpec(num_heads=HEADS, num_kv_heads=KV_HEADS, head_size=head_size, scale=0.1, **others)


def attention() -> None:
    """Few requests and many, of every size of heads, and what a layer may have beside that."""
    for head_size, num_requests in ((64, 1), (96, 1), (128, 8), (128, 40), (256, 2)):
        batch = DecodeBatch([40] * num_requests, spec(head_size), BLOCK, BF16, device=CPU)
        workspace = decode.allocate_workspace(64, 512, batch.spec, CPU)
        batch.run_in(workspace, batch.table)
    special = spec(128, sliding_window=64, logits_soft_cap=30.0, has_sinks=True)
    batch = DecodeBatch([40], special, BLOCK, BF16, device=CPU)
    batch.run_in(decode.allocate_workspace(64, 512, special, CPU), batch.table, sinks=batch.sinks)
    for kind in (spec(64), special):
        requests = Requests([(5, 9), (3, 3)], kind, block_size=16, dtype=BF16)
        requests.run(backend=VarlenBackend(), sinks=batch.sinks if kind.has_sinks else None)
        layer = requests.layer(VarlenBackend())
        q = torch.zeros(8, HEADS, kind.head_size, dtype=BF16)
        k = torch.zeros(8, KV_HEADS, kind.head_size, dtype=BF16)
        angles = torch.zeros(8, 1, kind.head_size)
        for rotation in (None, (angles, angles)):
            kv_kernels.rotate_and_write(q, k, k, rotation, layer)


def cache() -> None:
    marks, numbers = torch.zeros(2, 4, dtype=torch.int8), torch.zeros(2, dtype=torch.int64)
    kv_kernels.clean_blocks(torch.zeros(3, dtype=torch.int64), marks, numbers, numbers)


def rows() -> None:
    tokens, table = torch.zeros(5, 64, dtype=torch.int32), torch.zeros(5, 8, dtype=torch.int32)
    numbers, pairs = torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)
    row_kernels.gather_decodes(numbers, tokens, numbers, table, BLOCK)
    row_kernels.advance(pairs, numbers, numbers.int(), tokens, numbers, 4)


def layers() -> None:
    """Products of one row and of several, gated or not, with a bias or without; norms."""
    for num_rows in (1, 2, 16, 40):
        x, weight = torch.zeros(num_rows, 2048, dtype=BF16), torch.zeros(4096, 2048, dtype=BF16)
        for bias in (None, torch.zeros(4096, dtype=BF16)):
            skinny.linear(x, weight, bias)
        skinny.silu_gated(x, weight)
        model_kernels.add_rms_norm(x, None, x[0], 1e-5)
        model_kernels.add_rms_norm(x, x.clone(), x[0], 1e-5)
        model_kernels.silu_mul(x)


def collectives() -> None:
    pointers, epochs = torch.zeros(2, dtype=torch.int64), torch.zeros(64, dtype=torch.int32)
    inboxes = low_latency_reduce.Inboxes(0, 2, 64, 64, torch.zeros(1, dtype=torch.int64), pointers, epochs)
    low_latency_reduce.highest(inboxes, torch.zeros(40, dtype=torch.int64))
    x = torch.zeros(4, 2048, dtype=BF16)
    for residual in (None, x):
        low_latency_reduce.all_reduce_rms_norm(inboxes, x, residual, x[0], 1e-5)


def sampling() -> None:
    table = SamplingTable(4, range(VOCAB), CPU)
    samplings = {row: Sampling(top_p=0.9, seed=row, logprobs=2) for row in range(4)}
    table.set(samplings)
    for soft_cap in (None, 30.0):
        sampler = KernelSampler(table, VOCAB, 4, torch.zeros(5, 64, dtype=torch.int32), soft_cap)
        sampler.set(samplings, dict.fromkeys(range(4), 3))
        raw, numbers, lengths = torch.zeros(4, VOCAB, dtype=BF16), torch.arange(4), torch.zeros(4, dtype=torch.int32)
        pairs = best_plain_pairs(raw, numbers, lengths, table.temperatures, table.seeds, 0, soft_cap)
        sampler.redraw(raw, numbers, lengths, pairs)
        for lines in (None, numbers[1:]):
            sampler.logprobs(raw, numbers, pairs, lines=lines)


def main() -> None:
    driver.set_active(Driver())
    compiled = set[str]()
    launch: Callable[..., Any] = JITFunction.run

    def only_compile(kernel: Any, *args: Any, warmup: bool, **options: Any) -> None:
        launch(kernel, *args, warmup=True, **options)
        compiled.add(kernel.fn.__name__)

    JITFunction.run = only_compile
    for part in (attention, cache, rows, layers, collectives, sampling):
        part()
    print("\n".join(sorted(compiled)))


if __name__ == "__main__":
    main()
