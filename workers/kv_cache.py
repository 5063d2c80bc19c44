"""The paged KV cache of one rank, and how many blocks its memory holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec


def block_bytes(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes on this rank: keys and values of `block_size` tokens in every layer."""
    per_token = sum(2 * spec.num_kv_heads * spec.head_size for spec in specs)
    return per_token * block_size * dtype.itemsize


def allocate_kv_cache(
    specs: Sequence[AttentionSpec], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One zeroed tensor per layer: [2 (key, value), num_blocks, block_size, kv_heads, head_size]."""
    return [
        torch.zeros(2, num_blocks, block_size, spec.num_kv_heads, spec.head_size, dtype=dtype, device=device)
        for spec in specs
    ]
