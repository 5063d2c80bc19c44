"""FlashAttention-3 behind the attention op: one call for chunks of any length, over the paged cache.

Source: Shah and others, FlashAttention-3, arXiv:2407.08608; the package `flash_attn_interface`. Its operator is called
as it is: the package's Python function around it imports torch._dynamo, seconds of a start, and checks every call.
"""

from typing import Any

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import processors
from eagleray.workers.attention.context import PagedKVLayer

try:
    import flash_attn_interface  # which registers the operator
except ImportError:
    flash_attn_interface = None

HEAD_SIZES = range(8, 257, 8)


class FlashBackend:
    """FlashAttention-3 as an attention backend."""

    name = "FlashAttention-3"
    capturable = True

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it is installed and computes such a layer here: on Hopper, in 16 bits, heads up to 256.

        Wheels are built without soft caps, and not all know sinks.
        """
        return (
            flash_attn_interface is not None
            and processors(device).run_hopper_code
            and dtype in (torch.bfloat16, torch.float16)
            and spec.head_size in HEAD_SIZES
            and spec.logits_soft_cap is None
            and not spec.has_sinks
        )

    def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
        """What it gives tokens of no request is nothing to rely on."""
        assert layer.sinks is None, "`supports` says no to layers with sinks"
        metadata, spec = layer.metadata, layer.spec
        window = -1 if spec.sliding_window is None else spec.sliding_window - 1  # of keys before a query's own
        out: Any = torch.ops.flash_attn_3.fwd(
            q,
            layer.cache.k,
            layer.cache.v,
            seqused_k=metadata.seq_lens,
            page_table=metadata.block_table,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            softmax_scale=spec.scale,
            is_causal=True,
            window_size_left=window,
            window_size_right=0 if window >= 0 else -1,
            # 0: as many as its room is for, which bounds would make too large
            num_splits=1 if metadata.is_padded else 0,
        )[0]
        return out  # type: ignore[no-any-return]
