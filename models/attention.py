"""Attention as one op that takes only tensors and the layer's index.

The op is declared here, without an implementation: the code that runs the model provides one, and knows what else
attention needs. `torch.compile` sees one opaque op.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eagleray.parallel.weight_shard import WeightShard, region

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
    has_sinks: bool = False  # each head has a score that joins the softmax without a value


class Attention(nn.Module):
    """Causal attention of layer `layer_index`. It has no weights but the sinks of this rank's heads, if it has any.

    Sinks, which implementations of the op read from here, are as in Xiao and others, Efficient Streaming Language
    Models with Attention Sinks, arXiv:2309.17453, and GPT-OSS, arXiv:2508.10925: learned, and no key has them.
    """

    def __init__(self, layer_index: int, spec: AttentionSpec, num_heads: int, own: range) -> None:
        """Of the whole layer's `num_heads` query heads, this rank has those in `own`."""
        super().__init__()
        self.layer_index = layer_index
        self.spec = spec
        self.num_heads, self.own = num_heads, own
        sinks = torch.empty(len(own), dtype=torch.float32) if spec.has_sinks else None
        self.sinks = None if sinks is None else nn.Parameter(sinks, requires_grad=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """`q` is `[tokens, num_heads * head_size]`, `k` and `v` are `[tokens, num_kv_heads * head_size]`; like `q`.

        The op turns the heads of `q` and `k` by `rotation` first (`layers.rotate`), since it touches them anyway.
        """
        head_size = self.spec.head_size
        q, k, v = (x.view(*x.shape[:-1], -1, head_size) for x in (q, k, v))
        out: Tensor = torch.ops.eagleray.attention(q, k, v, self.layer_index, *rotation)
        return out.flatten(-2)

    def weight_shards(self) -> list[WeightShard]:
        """Checkpoints have the sinks in the layer that holds this one: `self_attn.sinks`."""
        if self.sinks is None:
            return []
        shape, cut = (self.num_heads,), region(self.own)
        return [WeightShard(part="", name="sinks", shape=shape, region=cut, target=self.sinks.detach())]


def attention_layers(model: nn.Module) -> list[Attention]:
    """Every attention layer of `model`, in the order of their indices, which must be 0, 1, 2 and so on."""
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    layers.sort(key=lambda layer: layer.layer_index)
    assert [layer.layer_index for layer in layers] == list(range(len(layers))), "layer indices must count from 0"
    return layers
