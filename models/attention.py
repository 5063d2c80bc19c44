"""Attention as one op that takes only tensors and the index of the layer.

The op is declared here, without an implementation: whoever runs the model provides one, and knows what else attention
needs. `torch.compile` sees one opaque op.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

torch.library.define(
    "eagleray::attention",
    "(Tensor q, Tensor k, Tensor v, int layer_index, Tensor? cos=None, Tensor? sin=None) -> Tensor",
)


@torch.library.register_fake("eagleray::attention")  # type: ignore[untyped-decorator]
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, layer_index: int, cos: Tensor | None = None, sin: Tensor | None = None
) -> Tensor:
    return q.new_empty(q.shape)


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What one layer's attention computes. Heads are those of this rank."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    sliding_window: int | None = None  # a token sees itself and the window - 1 tokens before it
    logits_soft_cap: float | None = None  # cap * tanh(scores / cap), after the scale


class Attention(nn.Module):
    """Causal attention of layer `layer_index`; it has no weights."""

    def __init__(self, layer_index: int, spec: AttentionSpec) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.spec = spec

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """`q` is `[tokens, num_heads * head_size]`, `k` and `v` are `[tokens, num_kv_heads * head_size]`; like `q`.

        The op turns the heads of `q` and `k` by `rotation` first (`layers.rotate`), since it touches them anyway.
        """
        head_size = self.spec.head_size
        q, k, v = (x.view(*x.shape[:-1], -1, head_size) for x in (q, k, v))
        out: Tensor = torch.ops.eagleray.attention(q, k, v, self.layer_index, *rotation)
        return out.flatten(-2)


def attention_layers(model: nn.Module) -> list[Attention]:
    """Every attention layer of `model`, in the order of their indices, which must be 0, 1, 2 and so on."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    layers.sort(key=lambda layer: layer.layer_index)
    assert [layer.layer_index for layer in layers] == list(range(len(layers))), "layer indices must count from 0"
    return layers
