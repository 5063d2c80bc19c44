"""The forward context: what a model's ops need besides their tensors, for exactly one forward pass."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import platform_of

KERNEL_HEAD_SIZES = (64, 96, 128, 256)  # of the attention kernels in Triton


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """One batch, request after request: request `i` owns tokens `query_start_loc[i]` up to `query_start_loc[i + 1]`.

    Tokens before the first request and after the last belong to nobody here, and what attention gives them is nothing.
    """

    query_start_loc: Tensor  # [requests + 1] int32
    seq_lens: Tensor  # [requests] int32, tokens in the cache once this batch is written
    slot_mapping: Tensor  # [tokens] int64, where each new key and value goes
    block_table: Tensor  # [requests, max_blocks] int32
    max_query_len: int
    max_seq_len: int
    is_padded: bool = False  # the two above are bounds that no request may reach
    num_single: int = 0  # the first requests, that have one token each
    rest: "AttentionMetadata | None" = None  # the same tokens without those requests, if there are both kinds


class LayerCache:
    """The paged KV cache of one layer. The views of its halves are made once, not in every step."""

    def __init__(self, kv: Tensor, marks: Tensor) -> None:
        self.kv = kv  # [2, num_blocks, block_size, kv_heads, head_size], keys then values
        self.k, self.v = kv[0], kv[1]  # each [num_blocks, block_size, kv_heads, head_size]
        self.marks = marks  # [num_blocks] int8, 1 for blocks that hold a number that is not finite
        self.is_written_in_kernel = platform_of(kv.device).compiles_kernels

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.kv.shape[2]


class AttentionBackend(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def capturable(self) -> bool:
        """Whether a CUDA graph can capture it: it asks nothing of the host."""

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether it computes such a layer here."""

    def __call__(self, q: Tensor, layer: "PagedKVLayer", /) -> Tensor:
        """Causal attention of `q` `[tokens, heads, head_size]` over the layer's cache; returns like `q`.

        The batch's own keys and values are in the cache already. Tokens of no request are as the backend says.
        """


@dataclass(frozen=True, slots=True)
class PagedKVLayer:
    """What attention over a paged KV cache finds, of one layer: everything but queries, keys and values.

    What else a layer's attention needs becomes a field here, and the backends that can use it read it.
    """

    metadata: AttentionMetadata  # layers may share it
    cache: LayerCache
    spec: AttentionSpec
    backend: AttentionBackend
    sinks: Tensor | None = None  # [num_heads] float32 scores that join the softmax without a value, if the spec has any


LayerContext = PagedKVLayer  # a layer with another kind of state, such as a recurrent one, joins with `|`
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """One forward pass. What the pass gives all layers alike is a field here, as each request's adapter would be."""

    layers: Sequence[LayerContext]  # by layer index
    scratch: dict[Hashable, Any] = field(default_factory=dict)  # what layers work out for each other, such as masks


_current: ForwardContext | None = None


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Set the context for one forward pass, at whose end its scratch is emptied.

    Passes never overlap in a process: nesting raises `RuntimeError`.
    """
    global _current
    if _current is not None:
        raise RuntimeError("a forward pass is already running; forward contexts are never nested")
    _current = context
    try:
        yield
    finally:
        _current = None
        context.scratch.clear()


def current_context() -> ForwardContext:
    """The context of the pass that is running. Raises `RuntimeError` outside of one."""
    if _current is None:
        raise RuntimeError("attention runs only inside `with forward_context(...)`")
    return _current


def current_layer(layer_index: int, kind: type[_Kind]) -> _Kind:
    """The context of one layer, of the kind that an op needs.

    Raises `RuntimeError` outside of a forward pass, for a layer it does not have, or for one of another kind.
    """
    layers = current_context().layers
    if not 0 <= layer_index < len(layers):
        raise RuntimeError(f"the forward context has {len(layers)} layers, so no layer {layer_index}")
    layer = layers[layer_index]
    if not isinstance(layer, kind):
        raise RuntimeError(f"the op of layer {layer_index} needs a {kind.__name__}, and finds a {type(layer).__name__}")
    return layer
