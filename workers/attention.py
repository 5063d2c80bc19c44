"""The plain PyTorch implementation of `eagleray::attention`: for CPU, and the oracle of every faster one.

Keys and values of the whole batch are written first, so a request may read blocks that another one writes.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.models.attention import AttentionSpec
from eagleray.workers.context import AttentionMetadata, current_layer

_QUERIES_AT_ONCE = 256  # bounds the mask and the scores of a long slice


@torch.library.impl("eagleray::attention", ("cpu", "cuda"))
def attention(q: Tensor, k: Tensor, v: Tensor, layer_index: int) -> Tensor:
    """`q` is `[tokens, heads, head_size]`, `k` and `v` are `[tokens, kv_heads, head_size]`; like `q`."""
    layer = current_layer(layer_index)
    write_kv(k, v, layer.kv_cache, layer.metadata.slot_mapping)
    return reference_attention(q, layer.kv_cache[0], layer.kv_cache[1], layer.metadata, layer.spec)


def write_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put each token's key and value into its slot."""
    tokens = slot_mapping.shape[0]
    for cache, new in zip(kv_cache.flatten(1, 2), (k, v), strict=True):
        cache.index_copy_(0, slot_mapping, new[:tokens])


def reference_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: AttentionMetadata, spec: AttentionSpec
) -> Tensor:
    """Causal attention over keys and values in `[num_blocks, block_size, kv_heads, head_size]`; returns like `q`.

    Slices of one token are attended in one padded batch, longer ones request by request. Tokens of `q` beyond the
    last request are padding, and their output is 0.
    """
    starts = metadata.query_start_loc.tolist()
    seq_lens = metadata.seq_lens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    single = [i for i, length in enumerate(lengths) if length == 1]
    if single:
        tokens = [starts[i] for i in single]
        out[tokens] = _attend_single(
            q[tokens], k_cache, v_cache, metadata.block_table[single], [seq_lens[i] for i in single], spec
        )
    for i, length in enumerate(lengths):
        if length > 1:
            own = slice(starts[i], starts[i] + length)
            out[own] = _attend_slice(q[own], k_cache, v_cache, metadata.block_table[i], seq_lens[i], spec)
    return out


def _attend_single(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, seq_lens: list[int], spec: AttentionSpec
) -> Tensor:
    """One query per request, the last token of each: `q` is `[requests, heads, head_size]`."""
    num_blocks = -(-max(seq_lens) // k_cache.shape[1])
    blocks = block_table[:, :num_blocks]
    ends = torch.tensor(seq_lens, device=q.device).unsqueeze(1)
    places = torch.arange(num_blocks * k_cache.shape[1], device=q.device)
    seen = places < ends
    if spec.sliding_window is not None:
        seen &= places >= ends - spec.sliding_window
    k, v = _gather(k_cache, blocks), _gather(v_cache, blocks)
    return _attend(q.unsqueeze(1), k, v, seen.unsqueeze(1), spec).squeeze(1)


def _attend_slice(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, blocks: Tensor, seq_len: int, spec: AttentionSpec
) -> Tensor:
    """The last tokens of one request: `q` is `[tokens, heads, head_size]`. Blocks that no query sees stay unread."""
    block_size, out = k_cache.shape[1], torch.empty_like(q, memory_format=torch.contiguous_format)
    for first in range(0, q.shape[0], _QUERIES_AT_ONCE):
        queries = q[first : first + _QUERIES_AT_ONCE]
        start = seq_len - q.shape[0] + first
        end = start + queries.shape[0]
        lowest = 0 if spec.sliding_window is None else max(0, start - spec.sliding_window + 1) // block_size
        own = blocks[lowest : -(-end // block_size)].unsqueeze(0)
        positions = torch.arange(start, end, device=q.device).unsqueeze(1)
        places = torch.arange(own.shape[1] * block_size, device=q.device) + lowest * block_size
        seen = places <= positions
        if spec.sliding_window is not None:
            seen &= places > positions - spec.sliding_window
        k, v = _gather(k_cache, own), _gather(v_cache, own)
        out[first : first + queries.shape[0]] = _attend(queries.unsqueeze(0), k, v, seen.unsqueeze(0), spec)[0]
    return out


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The contents of `blocks`, `[requests, n]`, as `[requests, n * block_size, kv_heads, head_size]`."""
    chosen = cache.index_select(0, blocks.reshape(-1))
    return chosen.view(blocks.shape[0], -1, *cache.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, spec: AttentionSpec) -> Tensor:
    """`q` is `[n, queries, heads, head_size]`, `k` and `v` are `[n, keys, kv_heads, head_size]`; like `q`.

    `seen` is `[n, queries, keys]`. The query heads of a KV head stand beside its queries, so nothing is repeated.
    """
    n, queries, heads, head_size = q.shape
    group = heads // k.shape[2]
    # [n, kv_heads, group * queries, head_size]
    q = q.view(n, queries, -1, group, head_size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    seen = seen.repeat(1, group, 1).unsqueeze(1)
    if spec.logits_soft_cap is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=spec.scale)
    else:
        out = _capped_attention(q, k, v, seen, spec.scale, spec.logits_soft_cap)
    return out.reshape(n, -1, group, queries, head_size).permute(0, 3, 1, 2, 4).reshape(n, queries, heads, head_size)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, cap: float) -> Tensor:
    """Softmax in float32 over `cap * tanh(scores / cap)`, as in Gemma 2."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    scores = (torch.tanh(scores / cap) * cap).masked_fill(~seen, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1), v.float()).to(q.dtype)
