"""Batches of decodes with a paged cache, and what the decode kernel must make of them.

Importing this imports the kernels, so Triton decides by then whether to interpret them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.context import (
    AttentionMetadata,
    ForwardContext,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.decode import (
    DecodeWorkspace,
    LaunchConstants,
    allocate_workspace,
    attend_planned,
    plan_decode,
)
from eagleray.workers.attention.reference import ReferenceBackend
from support.attention_requests import paged

FINE, COARSE = 1 << 20, 0  # for lanes: always chunks, always sections


class DecodeBatch:
    """Requests with random queries and caches. A row of -1 is padding; what belongs to nobody is huge."""

    def __init__(
        self,
        seq_lens: Sequence[int],
        spec: AttentionSpec,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        *,
        device: torch.device,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        n, self.spec, self.device = len(seq_lens), spec, device
        num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
        free = torch.randperm(sum(num_blocks) + 5, generator=generator)
        shape = (2, len(free), block_size, spec.num_kv_heads, spec.head_size)
        cache = torch.full(shape, 1e4)
        self.table = torch.zeros(n, max(*num_blocks, 1) + 2, dtype=torch.int32)
        for i, seq_len in enumerate(seq_lens):
            blocks = free[sum(num_blocks[:i]) : sum(num_blocks[: i + 1])]
            self.table[i, : len(blocks)] = blocks
            slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:seq_len]
            new = torch.randn(2, seq_len, spec.num_kv_heads, spec.head_size, generator=generator)
            cache.flatten(1, 2)[:, slots] = new
        # as a split of a merged projection: not contiguous
        wide = torch.randn(n, 2 * spec.num_heads * spec.head_size, generator=generator)
        q = wide[:, : spec.num_heads * spec.head_size].view(n, spec.num_heads, spec.head_size)
        self.sinks = torch.randn(spec.num_heads, generator=generator).to(device)
        self.q, self.cache = q.to(device, dtype), cache.to(device, dtype)
        self.table, self.lens = self.table.to(device), torch.tensor(seq_lens, dtype=torch.int32, device=device)

    @property
    def tile(self) -> int:
        """Keys per iteration, so few that the pipeline's keys and values fit a GPU's shared memory."""
        row_bytes = self.spec.head_size * self.q.element_size()
        return 32 if row_bytes <= 512 else 16

    def run(self, lanes: int = FINE, sinks: Tensor | None = None, **constants: Any) -> Tensor:
        return self.run_in(self._workspace(lanes=lanes, **constants), self.table, sinks=sinks)

    def run_layers(self, num_layers: int, **constants: Any) -> list[Tensor]:
        """What each of some layers that are alike computes after one plan."""
        workspace, layer = self._workspace(lanes=FINE, **constants), self._layer(self.cache, self.lens, self.table)
        plan_decode(workspace, self.lens, self.spec)
        return [attend_planned(self.q, layer, workspace) for _ in range(num_layers)]

    def _workspace(self, **constants: Any) -> DecodeWorkspace:
        launch = LaunchConstants(**{"tile": self.tile, "worth_cutting": 0, **constants})
        return allocate_workspace(len(self.lens), int(self.lens.max()), self.spec, self.device, launch)

    def run_in(
        self, workspace: DecodeWorkspace, table: Tensor, rows: Tensor | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Planned and attended in `workspace`, through `table`, of which `rows` are the requests' if given."""
        plan_decode(workspace, self.lens, self.spec, rows=rows)
        layer = self._layer(self.cache, self.lens, table, sinks)
        return attend_planned(self.q, layer, workspace)

    def _layer(self, cache: Tensor, lens: Tensor, table: Tensor, sinks: Tensor | None = None) -> PagedKVLayer:
        metadata = AttentionMetadata(
            query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32, device=self.device),
            seq_lens=lens,
            slot_mapping=torch.empty(0, dtype=torch.int64, device=self.device),
            block_table=table,
            max_query_len=1,
            max_seq_len=int(lens.max()),
        )
        return PagedKVLayer(metadata, paged(cache), self.spec, ReferenceBackend(), sinks)

    def expected(self) -> Tensor:
        """By the plain implementation, in float32, of the requests that are not padding."""
        live = self.lens > 0
        layer = self._layer(self.cache.float(), self.lens[live], self.table[live])
        out = torch.zeros_like(self.q, dtype=torch.float32)
        with forward_context(ForwardContext([layer])):
            out[live] = layer.backend(self.q[live].float(), layer)
        return out


def spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 0.125, **changes})


SPECS = {
    "plain": spec(),
    "heads of 96": spec(head_size=96),
    "heads of 128": spec(head_size=128),
    "heads of 256": spec(head_size=256),
    "one query head per KV head": spec(num_heads=3, num_kv_heads=3),
    "seven query heads per KV head": spec(num_heads=7, num_kv_heads=1),
    "twenty query heads per KV head": spec(num_heads=20, num_kv_heads=1),
    "window": spec(sliding_window=100),
    "window of one token": spec(sliding_window=1),
    "window of more than a section": spec(sliding_window=260),
    "soft cap": spec(logits_soft_cap=1.5),
    "window and soft cap": spec(sliding_window=33, logits_soft_cap=1.5),
}
LENGTHS = [1, 0, 15, 16, 17, 255, 256, 0, 257, 330, 0]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # the weights are rounded to dtype


def check(batch: DecodeBatch, out: Tensor) -> None:
    limit = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float(), batch.expected(), atol=limit, rtol=limit)
    assert not out[batch.lens == 0].any()
