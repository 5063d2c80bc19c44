"""The paged KV cache of one rank, and how many blocks its memory holds."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.workers.attention.context import LayerCache

if HAS_TRITON:
    from eagleray.workers.attention import kv_kernels


def block_bytes(specs: Sequence[AttentionSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes on this rank: keys and values of `block_size` tokens in every layer."""
    per_token = sum(2 * spec.num_kv_heads * spec.head_size for spec in specs)
    return per_token * block_size * dtype.itemsize


class KVCache:
    """Keys and values of every layer, of which each block is finite when a request gets it.

    Attention reads a block's slots behind a request's last token with weight 0, and 0 times NaN is NaN. So a request
    whose keys or values overflow must leave nothing behind: the kernel that writes such numbers marks the block, and
    `clean` zeroes what is marked before the block goes to another request. All of that is on the device.
    """

    def __init__(
        self, specs: Sequence[AttentionSpec], num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Zeroed, one cache per layer."""
        tensors = [
            torch.zeros(2, num_blocks, block_size, spec.num_kv_heads, spec.head_size, dtype=dtype, device=device)
            for spec in specs
        ]
        self.marks = torch.zeros(len(specs), num_blocks, dtype=torch.int8, device=device)  # 1 for what is not finite
        self.layers = [LayerCache(kv, marks) for kv, marks in zip(tensors, self.marks, strict=True)]
        self._cleans_in_kernel = platform_of(device).runs_kernels
        self._addresses = torch.tensor([kv.data_ptr() for kv in tensors], device=device)
        self._side_bytes = torch.tensor([kv[0].nbytes for kv in tensors], device=device)
        self.clean(torch.zeros(1, dtype=torch.int64, device=device))  # compiles the kernel, where there is one

    def clean(self, blocks: Tensor) -> None:
        """Zero what of `blocks` [n] is marked, in every layer. Asks nothing of the host on a GPU."""
        if self._cleans_in_kernel:
            kv_kernels.clean_blocks(blocks, self.marks, self._addresses, self._side_bytes)
        elif self.marks[:, blocks].any():
            for layer in self.layers:
                odd = blocks[layer.marks[blocks] != 0]
                layer.kv[:, odd] = 0
                layer.marks[odd] = 0
