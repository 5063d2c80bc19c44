"""Runs a model over batches, each within a forward context that holds what its ops need besides tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor

import eagleray.workers.attention.op  # noqa: F401  implements the op that models call
from eagleray.models.decoder import CausalLM
from eagleray.workers.attention.backends import choose_backend
from eagleray.workers.attention.context import (
    AttentionBackend,
    AttentionMetadata,
    ForwardContext,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.kv_cache import KVCache
from eagleray.workers.rows import Batch


class ModelRunner:
    """A model shard and its KV cache of `num_blocks` blocks."""

    def __init__(self, model: CausalLM, num_blocks: int, block_size: int, *, compile: bool) -> None:
        self.model = model
        self.dtype, self.device = model.dtype, model.device
        self.specs = [layer.spec for layer in model.attentions]
        self.backends = [choose_backend(spec, self.dtype, self.device) for spec in self.specs]  # of each layer
        self.kv_cache = KVCache(self.specs, num_blocks, block_size, self.dtype, self.device)
        self._forward = torch.compile(model, fullgraph=True, dynamic=True) if compile else model

    def forward(self, batch: Batch, backends: Sequence[AttentionBackend] | None = None) -> Tensor:
        """Hidden states `[tokens, hidden_size]` of a batch, with `backends` instead of the layers' own if given."""
        with forward_context(self._context(batch.metadata, self.backends if backends is None else backends)):
            hidden: Tensor = self._forward(batch.input_ids, batch.positions)
        return hidden

    def _context(self, metadata: AttentionMetadata, backends: Sequence[AttentionBackend]) -> ForwardContext:
        layers = zip(self.kv_cache.layers, self.model.attentions, backends, strict=True)
        return ForwardContext(
            [PagedKVLayer(metadata, cache, layer.spec, backend, layer.sinks) for cache, layer, backend in layers]
        )
