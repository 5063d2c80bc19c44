"""The attention op `eagleray::attention`: keys and values go to the paged cache, then the layer's backend attends.

Keys and values of the whole batch are written first, so a request may read blocks that another one writes.
"""

import torch
from torch import Tensor

from eagleray.models.layers import rotate
from eagleray.parallel.platform import HAS_TRITON, device_types
from eagleray.workers.attention.context import PagedKVLayer, current_layer

if HAS_TRITON:
    from eagleray.workers.attention import kv_kernels


@torch.library.impl("eagleray::attention", device_types(lambda platform: True))
def attention(
    q: Tensor, k: Tensor, v: Tensor, layer_index: int, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    """`q` is `[tokens, heads, head_size]`, `k` and `v` are `[tokens, kv_heads, head_size]`; like `q`."""
    layer = current_layer(layer_index, PagedKVLayer)
    rotation = None if cos is None or sin is None else (cos, sin)
    return layer.backend(rotate_and_write(q, k, v, rotation, layer), layer)


def rotate_and_write(
    q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor] | None, layer: PagedKVLayer
) -> Tensor:
    """Turn queries and keys, and put each token's key and value into its slot; returns the queries.

    Tokens beyond the slot mapping are padding. Blocks that get a number that is not finite are marked.
    """
    cache, slot_mapping = layer.cache, layer.metadata.slot_mapping
    if cache.is_written_in_kernel:
        return kv_kernels.rotate_and_write(q, k, v, rotation, layer)
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    tokens = slot_mapping.shape[0]
    for side, new in zip(cache.kv.flatten(1, 2), (k[:tokens], v[:tokens]), strict=True):
        side.index_copy_(0, slot_mapping, new)
        finite = new.isfinite()
        if not finite.all():
            cache.marks[slot_mapping[~finite.flatten(1).all(dim=1)] // cache.block_size] = 1
    return q
