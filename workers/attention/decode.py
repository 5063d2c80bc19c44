"""Paged attention for one query token per request, split over the keys, in Triton: for CUDA, or Triton's interpreter.

A request's keys are cut in sections of much the same length, one for every 2,048 keys but at most 16, and each section
in eight chunks, at places that the request's own length decides. Softmax runs over a chunk; chunks are merged to
sections one after the other, and sections to the result all at once. Whether a chunk or a section is one program's
split of work depends on how much of the batch's work it is, but both go through the same operations in the same order:
a request's result is the same to the bit in any batch for which `launch_constants` are the same, that is, of any size
from some requests on.

The plan, who does which split, is made on the GPU from the lengths, once per step; all layers with the same heads and
window share it. No launch depends on a value on the GPU, so all of it can stand in a CUDA graph.
"""

from dataclasses import dataclass, replace
from math import e, log2

import torch
import triton
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import LAUNCH, OVERLAP, processors
from eagleray.workers.attention.context import PagedKVLayer
from eagleray.workers.attention.decode_kernels import (
    CHUNKS,
    FIELDS,
    MAX_SECTIONS,
    attend_kernel,
    combine_kernel,
    plan_kernel,
)

SECTION = 2048  # keys, at most until there are `MAX_SECTIONS`
COMBINING_PROGRAMS = 1024
FEW_PAIRS = 64  # of request and KV head
FEWER_PAIRS = 32  # whose chunks are a program each at once
CACHE_LINE = 128  # bytes
LARGE_TILES = 160 << 10  # bytes of shared memory that a processor must have for them


@dataclass(frozen=True, kw_only=True)
class LaunchConstants:
    """How the kernels are launched. Of these, `tile`, `num_warps` and `num_stages` may have a part in the rounding."""

    tile: int = 32  # keys per iteration; a power of two, from 16 to a chunk
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 4  # that run at once: the registers are shared out accordingly
    lanes: int = 480  # splits that together read at full speed: a section that is more than 1 in so many is cut
    worth_cutting: int = 256  # keys of a request; with fewer, cutting costs more than it brings
    short_chunks: bool = False  # a request of one section has chunks of an eighth of itself, not of `SECTION`
    early_tiles: int = 0  # of a program's first split, asked for while the kernel before still runs

    @property
    def num_registers(self) -> int:
        """The most that a thread may have, of the 65,536 of a processor, in eights."""
        return min(255, 65536 // (self.programs_per_sm * self.num_warps * 32) // 8 * 8)


def launch_constants(spec: AttentionSpec, num_requests: int, device: torch.device) -> LaunchConstants:
    """What was the fastest on an H200: large tiles for few splits of work, many programs for many."""
    if spec.head_size > 128:
        return LaunchConstants(programs_per_sm=2, lanes=240)
    pairs = num_requests * spec.num_kv_heads
    if pairs <= FEW_PAIRS and processors(device).shared_memory >= LARGE_TILES:
        few = LaunchConstants(tile=64, num_stages=4, programs_per_sm=2, early_tiles=3)
        return replace(few, worth_cutting=128, short_chunks=True) if pairs <= FEWER_PAIRS else few
    return LaunchConstants()


@dataclass(frozen=True, kw_only=True)
class DecodeWorkspace:
    """Buffers of the kernels, for layers that share heads and window, of which only one runs at a time."""

    fixed: LaunchConstants | None  # else what `launch_constants` says
    num_sms: int
    splits: Tensor  # [1] int32
    requests: Tensor  # [max_requests, 4] int32
    work: Tensor  # [max_splits, FIELDS] int32
    turns: Tensor  # [1] int32
    partial: Tensor  # [max_splits, heads, head_size] float32
    partial_ml: Tensor  # [max_splits, heads, 2] float32

    def constants(self, spec: AttentionSpec, num_requests: int) -> LaunchConstants:
        return self.fixed or launch_constants(spec, num_requests, self.splits.device)


def max_splits(max_requests: int, max_seq_len: int, spec: AttentionSpec, constants: LaunchConstants) -> int:
    """The most splits of work that a batch can have.

    A section that is cut is more than one `lanes`-th of the work, and a request's last section may be short: so no more
    than twice as many sections as lanes are cut.
    """
    visible = max_seq_len if spec.sliding_window is None else min(max_seq_len, spec.sliding_window + constants.tile)
    sections = max_requests * min(int(MAX_SECTIONS), -(-visible // SECTION))
    return sections + int(CHUNKS) * min(sections, 2 * -(-constants.lanes // spec.num_kv_heads))


def allocate_workspace(
    max_requests: int,
    max_seq_len: int,
    spec: AttentionSpec,
    device: torch.device,
    constants: LaunchConstants | None = None,
) -> DecodeWorkspace:
    """Buffers for batches of up to `max_requests` requests (padding included) of up to `max_seq_len` tokens."""
    splits = max_splits(max_requests, max_seq_len, spec, constants or launch_constants(spec, 1, device))
    return DecodeWorkspace(
        fixed=constants,
        num_sms=processors(device).number,
        splits=torch.zeros(1, dtype=torch.int32, device=device),
        requests=torch.zeros(max_requests, 4, dtype=torch.int32, device=device),
        work=torch.zeros(splits, int(FIELDS), dtype=torch.int32, device=device),
        turns=torch.zeros(1, dtype=torch.int32, device=device),
        partial=torch.empty(splits, spec.num_heads, spec.head_size, dtype=torch.float32, device=device),
        partial_ml=torch.empty(splits, spec.num_heads, 2, dtype=torch.float32, device=device),
    )


def plan_decode(
    workspace: DecodeWorkspace, seq_lens: Tensor, spec: AttentionSpec, *, rows: Tensor | None = None
) -> None:
    """Share out the work of one step: `seq_lens` is `[n]` int32 and `rows` `[n]` int64, both contiguous.

    Request `i` attends over its `seq_lens[i]` tokens, the last of which is its query. No request may have more tokens
    than the workspace is for. With `rows`, the block table is one of all rows, and `rows[i]` is the request's. The
    block table is to be what it will be when attention reads it.
    """
    n = seq_lens.shape[0]
    assert n <= workspace.requests.shape[0], "the workspace is for fewer requests"
    assert seq_lens.dtype == torch.int32
    assert rows is None or rows.dtype == torch.int64
    constants = workspace.constants(spec, n)
    plan_kernel[(1,)](
        seq_lens,
        rows,
        workspace.splits,
        workspace.requests,
        workspace.work,
        n,
        triton.cdiv(constants.lanes, spec.num_kv_heads),
        constants.worth_cutting,
        HAS_ROWS=rows is not None,
        WINDOW=spec.sliding_window or 0,
        TILE=constants.tile,
        SECTION=SECTION,
        SHORT_CHUNKS=constants.short_chunks,
        N_PAD=max(16, triton.next_power_of_2(workspace.requests.shape[0])),  # one kernel for batches of all sizes
        PDL=OVERLAP,
        num_warps=8,
        **LAUNCH,
    )
    # Also after a step that failed between two launches. It begins after all before it has ended, and nothing behind it
    # begins earlier than that: so attention may read the plan and the block table before what runs meanwhile has ended.
    workspace.turns.zero_()


def attend_planned(q: Tensor, layer: PagedKVLayer, workspace: DecodeWorkspace, into: Tensor | None = None) -> Tensor:
    """Attention of one layer, after `plan_decode` for this batch.

    `q` is `[n, heads, head_size]` (any strides with the last one 1), and request `i`, whose query is `q[i]`, reads
    through row `i` of the layer's block table, or the row that `plan_decode` was told. Keys and values have the same
    strides. Returns `[n, heads, head_size]`, contiguous, 0 where a request has length 0: such a one is padding, and
    costs nothing. Given such a tensor as `into`, it writes there, and leaves the lines of requests of length 0 as they
    are.
    """
    k_cache, v_cache, spec, sinks = layer.cache.k, layer.cache.v, layer.spec, layer.sinks
    block_table = layer.metadata.block_table  # [requests, max_blocks] int32
    n, heads, head_size = q.shape
    constants, block_size = workspace.constants(spec, n), k_cache.shape[1]
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride(3) == q.stride(2) == block_table.stride(1) == 1
    assert (heads, head_size, k_cache.shape[2]) == (spec.num_heads, spec.head_size, spec.num_kv_heads)
    assert block_size & (block_size - 1) == 0, "the kernel wants blocks of a power of two"
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if into is None else into
    assert out.is_contiguous()
    head_pad, group = triton.next_power_of_2(head_size), heads // spec.num_kv_heads
    programs = workspace.num_sms * constants.programs_per_sm
    attend_kernel[(min(programs, workspace.work.shape[0] * spec.num_kv_heads),)](
        q,
        k_cache,
        v_cache,
        block_table,
        sinks,
        out,
        workspace.splits,
        workspace.work,
        workspace.turns,
        workspace.partial,
        workspace.partial_ml,
        spec.scale * log2(e),
        (spec.logits_soft_cap or 1.0) * log2(e),
        q.stride(0),
        q.stride(1),
        block_table.stride(0),
        k_cache.stride(0),
        k_cache.stride(1),
        k_cache.stride(2),
        KV_HEADS=spec.num_kv_heads,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size,
        TILE=constants.tile,
        HAS_CAP=spec.logits_soft_cap is not None,
        HAS_SINKS=sinks is not None,
        EARLY_TILES=constants.early_tiles,
        HEAD_BYTES=head_size * k_cache.itemsize,
        LINES=triton.next_power_of_2(triton.cdiv(head_size * k_cache.itemsize, CACHE_LINE)),
        PDL=OVERLAP,
        num_warps=constants.num_warps,
        num_stages=constants.num_stages,
        maxnreg=constants.num_registers,
        **LAUNCH,
    )
    heads_each = triton.cdiv(n * heads, COMBINING_PROGRAMS)
    combine_kernel[(n, triton.cdiv(heads, heads_each))](
        out,
        sinks,
        workspace.requests,
        workspace.turns,
        workspace.partial,
        workspace.partial_ml,
        heads_each,
        HEADS=heads,
        HEAD_SIZE=head_size,
        HEAD_PAD=head_pad,
        HAS_SINKS=sinks is not None,
        FILLS=into is None,
        PDL=OVERLAP,
        num_warps=1,
        **LAUNCH,
    )
    return out
