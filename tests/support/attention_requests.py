"""Batches of chunks of any length with a paged cache, and attention over them by the definition, in numpy."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

import eagleray.workers.attention.op  # noqa: F401  implements the op
from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.context import (
    AttentionBackend,
    AttentionMetadata,
    ForwardContext,
    LayerCache,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.reference import ReferenceBackend

BLOCK_SIZE = 4
METADATA_TENSORS = ("query_start_loc", "seq_lens", "slot_mapping", "block_table")
Array = np.ndarray[Any, np.dtype[np.float64]]


def paged(kv: Tensor) -> LayerCache:
    """The cache of one layer, `[2, num_blocks, block_size, kv_heads, head_size]`, with no block marked."""
    return LayerCache(kv, torch.zeros(kv.shape[1], dtype=torch.int8, device=kv.device))


class Requests:
    """A batch of requests with random queries, keys and values, and a paged cache that holds what came before.

    `lengths` has the number of tokens in this batch, and of all tokens, of each request.
    """

    def __init__(
        self,
        lengths: Sequence[tuple[int, int]],
        spec: AttentionSpec,
        seed: int = 0,
        *,
        block_size: int = BLOCK_SIZE,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.spec = spec
        self.kv = [
            torch.randn(2, seq_len, spec.num_kv_heads, spec.head_size, generator=generator).to(dtype)
            for _, seq_len in lengths
        ]
        self.queries = [
            torch.randn(n, spec.num_heads, spec.head_size, generator=generator).to(dtype) for n, _ in lengths
        ]
        num_blocks = [-(-seq_len // block_size) for _, seq_len in lengths]
        blocks = torch.randperm(sum(num_blocks) + 3, generator=generator)
        table = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
        # What nobody wrote is huge, so that reading it spoils the result.
        self.cache = torch.full((2, len(blocks), block_size, spec.num_kv_heads, spec.head_size), 6e4, dtype=dtype)
        slots = []
        for i, (n, seq_len) in enumerate(lengths):
            own = blocks[sum(num_blocks[:i]) : sum(num_blocks[: i + 1])]
            table[i, : len(own)] = own
            every_slot = (own[:, None] * block_size + torch.arange(block_size)).flatten()[:seq_len]
            self.cache.flatten(1, 2)[:, every_slot[: seq_len - n]] = self.kv[i][:, : seq_len - n]
            slots.append(every_slot[seq_len - n :])
        self.metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, *accumulate(n for n, _ in lengths)], dtype=torch.int32),
            seq_lens=torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            block_table=table,
            max_query_len=max(n for n, _ in lengths),
            max_seq_len=max(seq_len for _, seq_len in lengths),
        )
        if device != "cpu":
            self._move(device)

    def _move(self, device: str) -> None:
        self.kv, self.queries = [kv.to(device) for kv in self.kv], [q.to(device) for q in self.queries]
        self.cache = self.cache.to(device)
        moved = {name: getattr(self.metadata, name).to(device) for name in METADATA_TENSORS}
        self.metadata = replace(self.metadata, **moved)

    def layer(self, backend: AttentionBackend | None = None, sinks: Tensor | None = None) -> PagedKVLayer:
        """What attention finds, with the plain backend if none is given."""
        cache = paged(self.cache)
        return PagedKVLayer(self.metadata, cache, self.spec, backend or ReferenceBackend(), sinks)

    def run(self, padding: int = 0, backend: AttentionBackend | None = None, sinks: Tensor | None = None) -> Tensor:
        """Through the op, as a model calls it."""
        q = torch.cat([*self.queries, self.queries[0].new_ones(padding, *self.queries[0].shape[1:])])
        new = [kv[:, kv.shape[1] - len(q) :] for kv, q in zip(self.kv, self.queries, strict=True)]
        k, v = (torch.cat([kv[side] for kv in new] + [new[0].new_ones(padding, *new[0].shape[2:])]) for side in (0, 1))
        with forward_context(ForwardContext([self.layer(backend, sinks)])):
            out: Tensor = torch.ops.eagleray.attention(q, k, v, 0)
        return out

    def expected(self, sinks: Tensor | None = None) -> Tensor:
        out = [
            attend(
                query.double().cpu().numpy(),
                kv[:, : kv.shape[1] - len(queries) + i + 1].double().cpu().numpy(),
                self.spec,
                None if sinks is None else sinks.double().cpu().numpy(),
            )
            for queries, kv in zip(self.queries, self.kv, strict=True)
            for i, query in enumerate(queries)
        ]
        return torch.from_numpy(np.stack(out)).float()


def attend(query: Array, kv: Array, spec: AttentionSpec, sinks: Array | None = None) -> Array:
    """One query, `[heads, head_size]`, the last of the tokens in `kv`, in float64 by the definition.

    A sink is a key whose score is given, for each head, and whose value is 0.
    """
    keys, values = kv if spec.sliding_window is None else kv[:, -spec.sliding_window :]
    out = np.empty_like(query)
    for head in range(spec.num_heads):
        kv_head = head * spec.num_kv_heads // spec.num_heads
        scores = keys[:, kv_head] @ query[head] * spec.scale
        if spec.logits_soft_cap is not None:
            scores = np.tanh(scores / spec.logits_soft_cap) * spec.logits_soft_cap
        weights = np.exp(scores - scores.max())
        sink = 0.0 if sinks is None else np.exp(sinks[head] - scores.max())
        out[head] = weights / (weights.sum() + sink) @ values[:, kv_head]
    return out
