"""The forward context: what attention needs besides its tensors, for exactly one forward pass."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from eagleray.models.attention import AttentionSpec


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


class AttentionBackend(Protocol):
    """Attends, once the batch's keys and values are in the cache. It has the layer's sinks, if the spec says so."""

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
        /,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class LayerContext:
    """What one attention layer finds. Layers may share their metadata; all else is each layer's own."""

    metadata: AttentionMetadata
    kv_cache: Tensor  # [2, num_blocks, block_size, kv_heads, head_size], keys then values
    marks: Tensor  # [num_blocks] int8, 1 for blocks that hold a number that is not finite
    spec: AttentionSpec
    backend: AttentionBackend | None = None  # the plain PyTorch reference
    sinks: Tensor | None = None  # [num_heads] float32, if the spec has any


ForwardContext = Sequence[LayerContext]  # one per layer

_current: ForwardContext | None = None
_scratch: dict[Hashable, Any] = {}


@contextmanager
def forward_context(context: ForwardContext) -> Iterator[None]:
    """Set the context for one forward pass. Passes never overlap in a process: nesting raises `RuntimeError`."""
    global _current, _scratch
    if _current is not None:
        raise RuntimeError("a forward pass is already running; forward contexts are never nested")
    _current = context
    try:
        yield
    finally:
        _current, _scratch = None, {}


def scratch() -> dict[Hashable, Any]:
    """What layers work out for each other, such as masks: gone when the pass ends, and always new outside of one."""
    return {} if _current is None else _scratch


def current_layer(layer_index: int) -> LayerContext:
    """The context of one layer. Raises `RuntimeError` outside of a forward pass, or for a layer it does not have."""
    if _current is None:
        raise RuntimeError("attention runs only inside `with forward_context(...)`")
    if not 0 <= layer_index < len(_current):
        raise RuntimeError(f"the forward context has {len(_current)} layers, so no layer {layer_index}")
    return _current[layer_index]
