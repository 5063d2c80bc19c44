"""Paged causal attention over chunks of any length, in Triton: for CUDA, or Triton's interpreter.

It serves layers and GPUs that FlashAttention-3 does not. A program takes a block of one request's queries with all the
heads of one KV head, one below the other, so that keys and values are read once for the whole group; softmax runs over
the tiles of keys that any of the queries sees. Which request a program works for it finds by itself, so the host needs
to know nothing but how many tokens and requests there are.

Sources: Dao, FlashAttention-2, arXiv:2307.08691; the numbering of blocks over requests is that of vLLM's unified
attention kernel.
"""

from dataclasses import dataclass
from functools import cache
from math import e, log2

import torch
import triton
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import LAUNCH, OVERLAP, platform_of, processors
from eagleray.workers.attention.context import KERNEL_HEAD_SIZES, PagedKVLayer
from eagleray.workers.attention.varlen_kernels import varlen_attend_kernel


@dataclass(frozen=True, kw_only=True)
class LaunchConstants:
    """How the kernel is launched."""

    rows: int = 128  # queries times heads of a group in a program; a power of two from 16 on
    tile: int = 64  # keys per iteration; a power of two from 16 on
    num_warps: int = 8
    num_stages: int = 3


@cache
def launch_constants(head_size: int, device: torch.device) -> LaunchConstants:
    """Such that queries, and in each stage a tile of keys and values, fit the shared memory, in 16 bits."""
    kib = processors(device).shared_memory >> 10
    if head_size <= 128:  # 32 KiB of queries, 32 KiB per stage
        return LaunchConstants(num_stages=3 if kib >= 160 else 2)
    if kib >= 224:  # 64 KiB of queries, 64 KiB per stage
        return LaunchConstants(num_stages=2)
    return LaunchConstants(rows=64, tile=32, num_warps=4, num_stages=2)


class VarlenBackend:
    """The kernel as an attention backend, launched with `constants`, else as fits the layer and the device."""

    name = "Triton varlen"
    capturable = True

    def __init__(self, constants: LaunchConstants | None = None) -> None:
        self._constants = constants

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel computes chunks of such a layer on this device: compiled, in 16 bits."""
        return (
            platform_of(device).compiles_kernels
            and dtype in (torch.bfloat16, torch.float16)
            and spec.head_size in KERNEL_HEAD_SIZES
        )

    def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
        """`q` is of any strides with the last one 1. Blocks are of a power of two.

        Of tokens that belong to no request, the output is 0 beyond the last request, and not written before the first.
        """
        num_tokens, heads, head_size = q.shape
        k_cache, v_cache, metadata, spec, sinks = layer.cache.k, layer.cache.v, layer.metadata, layer.spec, layer.sinks
        block_size, group = k_cache.shape[1], heads // spec.num_kv_heads
        assert k_cache.stride() == v_cache.stride()
        assert k_cache.stride(3) == q.stride(2) == metadata.block_table.stride(1) == 1
        assert (heads, head_size, k_cache.shape[2]) == (spec.num_heads, spec.head_size, spec.num_kv_heads)
        assert block_size & (block_size - 1) == 0, "the kernel wants blocks of a power of two"
        constants = self._constants or launch_constants(head_size, q.device)
        rows = max(constants.rows, triton.next_power_of_2(group))
        n = metadata.seq_lens.shape[0]
        query_blocks = num_tokens // (rows // group) + n + 1  # one more for each request, and for the padding
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        varlen_attend_kernel[(query_blocks * spec.num_kv_heads,)](
            q,
            k_cache,
            v_cache,
            metadata.query_start_loc,
            metadata.seq_lens,
            metadata.block_table,
            sinks,
            out,
            n,
            num_tokens,
            spec.scale * log2(e),
            (spec.logits_soft_cap or 1.0) * log2(e),
            q.stride(0),
            q.stride(1),
            metadata.block_table.stride(0),
            k_cache.stride(0),
            k_cache.stride(1),
            k_cache.stride(2),
            KV_HEADS=spec.num_kv_heads,
            GROUP=group,
            ROWS=rows,
            HEAD_SIZE=head_size,
            HEAD_PAD=triton.next_power_of_2(head_size),
            BLOCK_SIZE=block_size,
            TILE=constants.tile,
            WINDOW=spec.sliding_window or 0,
            HAS_CAP=spec.logits_soft_cap is not None,
            HAS_SINKS=sinks is not None,
            PDL=OVERLAP,
            num_warps=constants.num_warps,
            num_stages=constants.num_stages,
            **LAUNCH,
        )
        return out
