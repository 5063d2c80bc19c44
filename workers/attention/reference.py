"""Attention in plain PyTorch, the reference for every faster backend."""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import platform_of
from eagleray.workers.attention.context import AttentionMetadata, PagedKVLayer, current_context

_QUERIES_AT_ONCE = 256  # bounds the mask and the scores of a long chunk


class ReferenceBackend:
    """Attention in plain PyTorch, on any device. It reads lengths on the host, which no CUDA graph can capture."""

    name = "plain PyTorch"
    capturable = False

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Every layer, everywhere."""
        return True

    def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
        """Of tokens that belong to no request, the output is 0.

        Slots of a request's last block that nobody wrote are read, with weight 0, so they must hold finite numbers.
        """
        metadata, cache, window = layer.metadata, layer.cache, layer.spec.sliding_window
        shared, key = current_context().scratch, ("visits", id(metadata), cache.block_size, window)
        if key not in shared:
            shared[key] = plan_visits(metadata, cache.block_size, window)
        out = torch.zeros_like(q, memory_format=torch.contiguous_format)
        for visit in shared[key]:
            k, v = _gather(cache.k, visit.blocks), _gather(cache.v, visit.blocks)
            queries = q[visit.tokens].reshape(visit.blocks.shape[0], -1, *q.shape[1:])
            out[visit.tokens] = _attend(queries, k, v, visit.seen, layer).flatten(0, 1)
        return out


class Visit(NamedTuple):
    """Queries that are attended together: equally many of each of `n` requests."""

    tokens: slice | Tensor  # of the batch, request after request
    blocks: Tensor  # [n, num_blocks], which they read
    seen: Tensor  # [n, queries, num_blocks * block_size], True where a query sees a key


def plan_visits(metadata: AttentionMetadata, block_size: int, window: int | None) -> list[Visit]:
    """Chunks of one token padded together, longer ones request by request and not too many queries at once.

    Layers with the same window share a plan. Blocks that no query of a long chunk sees stay unread.
    """
    starts, seq_lens = metadata.query_start_loc.tolist(), metadata.seq_lens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    visits = []
    single = [i for i, length in enumerate(lengths) if length == 1]
    for group in _alike(single, seq_lens):
        alone = len(group) == len(lengths)
        tokens = slice(starts[0], starts[-1]) if alone else _index([starts[i] for i in group], metadata)
        table = metadata.block_table if alone else metadata.block_table[_index(group, metadata)]
        ends = _index([seq_lens[i] for i in group], metadata)
        blocks = _own_blocks(table, ends, -(-max(seq_lens[i] for i in group) // block_size), block_size)
        visits.append(Visit(tokens, blocks, _seen(ends.unsqueeze(1) - 1, 0, blocks.shape[1] * block_size, window)))
    for i, length in enumerate(lengths):
        for first in range(0, length if length > 1 else 0, _QUERIES_AT_ONCE):
            queries = min(_QUERIES_AT_ONCE, length - first)
            start = seq_lens[i] - length + first  # position of the first query
            lowest = 0 if window is None else max(0, start - window + 1) // block_size
            blocks = metadata.block_table[i : i + 1, lowest : -(-(start + queries) // block_size)]
            positions = torch.arange(start, start + queries, device=blocks.device).unsqueeze(0)
            seen = _seen(positions, lowest * block_size, blocks.shape[1] * block_size, window)
            visits.append(Visit(slice(starts[i] + first, starts[i] + first + queries), blocks, seen))
    return visits


def _alike(requests: list[int], seq_lens: list[int]) -> list[list[int]]:
    """Group requests so that in a group no context is more than four times as long as another, from 64 tokens on."""
    groups: dict[int, list[int]] = {}
    for request in requests:
        groups.setdefault(max(3, seq_lens[request].bit_length() // 2), []).append(request)
    return list(groups.values())


def _own_blocks(table: Tensor, seq_lens: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """The first `num_blocks` columns of a table, where a shorter request's last block stands for all behind it.

    What the table has there is whatever a request before had, and may hold anything.
    """
    columns = torch.arange(num_blocks, device=table.device)
    return table.gather(1, torch.minimum(columns, ((seq_lens - 1) // block_size).unsqueeze(1)))


def _index(values: list[int], metadata: AttentionMetadata) -> Tensor:
    return torch.tensor(values, device=metadata.block_table.device)


def _seen(positions: Tensor, first_key: int, num_keys: int, window: int | None) -> Tensor:
    """Which of the keys from `first_key` on each query sees: `positions` is `[n, queries]`."""
    keys = torch.arange(first_key, first_key + num_keys, device=positions.device)
    seen = keys <= positions.unsqueeze(-1)
    return seen if window is None else seen & (keys > positions.unsqueeze(-1) - window)


def _gather(cache: Tensor, blocks: Tensor) -> Tensor:
    """The contents of `blocks`, `[n, num_blocks]`, as `[n, num_blocks * block_size, kv_heads, head_size]`."""
    chosen = cache.index_select(0, blocks.reshape(-1))
    return chosen.view(blocks.shape[0], -1, *cache.shape[2:])


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, layer: PagedKVLayer) -> Tensor:
    """`q` is `[n, queries, heads, head_size]`, `k` and `v` are `[n, keys, kv_heads, head_size]`; like `q`.

    The query heads of a KV head stand beside its queries, so that no key is repeated.
    """
    spec, sinks = layer.spec, layer.sinks
    n, queries, heads, head_size = q.shape
    group = heads // k.shape[2]
    # [n, kv_heads, group * queries, head_size]
    q = q.reshape(n, queries, -1, group, head_size).permute(0, 2, 3, 1, 4).flatten(2, 3)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    seen = (seen if queries == 1 else seen.repeat(1, group, 1)).unsqueeze(1)
    if spec.logits_soft_cap is None and sinks is None and platform_of(q.device).masks_exactly:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=spec.scale)
    else:
        of_rows = None if sinks is None else sinks.view(-1, group).repeat_interleave(queries, dim=1)
        out = _attend_by_hand(q, k, v, seen, spec, of_rows)
    return out.reshape(n, -1, group, queries, head_size).permute(0, 3, 1, 2, 4).reshape(n, queries, heads, head_size)


def _attend_by_hand(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 over the scores, or over `cap * tanh(scores / cap)` as in Gemma 2.

    A sink, of which `[kv_heads, group * queries]` has one for each query, is one more score, as in GPT-OSS.
    """
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * spec.scale
    if spec.logits_soft_cap is not None:
        scores = torch.tanh(scores / spec.logits_soft_cap) * spec.logits_soft_cap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is None:
        weights = scores.softmax(dim=-1)
    else:
        sinks = sinks.unsqueeze(-1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return torch.matmul(weights, v.float()).to(q.dtype)
