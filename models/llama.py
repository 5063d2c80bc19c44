"""Llama 2 and 3, SmolLM2, and Mistral, which is a Llama whose layers have a window."""

from typing import ClassVar

from torch import Tensor, nn

from eagleray.models.attention import Attention, AttentionSpec
from eagleray.models.config import ModelConfig
from eagleray.models.decoder import CausalLM, DecoderLayer
from eagleray.models.layers import GatedMLP, RMSNorm
from eagleray.models.weights import linear_weight
from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import QKVParallelLinear, RowParallelLinear, head_columns
from eagleray.parallel.sharding import shard_heads


class LlamaAttention(nn.Module):
    """Grouped-query attention with rotary positions. A family whose heads have sinks says so."""

    has_sinks: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, layer_index: int, tp: TPGroup) -> None:
        super().__init__()
        hidden, head_size, num_heads = config.hidden_size, config.head_size, config.num_heads
        heads = shard_heads(num_heads, config.num_kv_heads, tp.rank, tp.size)
        make_weight = linear_weight(config)
        self.qkv_proj = QKVParallelLinear(
            hidden, num_heads, config.num_kv_heads, head_size, heads, bias=config.qkv_bias, make_weight=make_weight
        )
        own = head_columns(heads.query, head_size)
        self.o_proj = RowParallelLinear(
            num_heads * head_size, hidden, own, tp, bias=config.output_bias, make_weight=make_weight
        )
        spec = AttentionSpec(
            num_heads=len(heads.query),
            num_kv_heads=len(heads.kv),
            head_size=head_size,
            scale=config.attention_scale,
            sliding_window=config.sliding_windows[layer_index],
            logits_soft_cap=config.attention_soft_cap,
            has_sinks=self.has_sinks,
        )
        self.attn = Attention(layer_index, spec, num_heads, heads.query)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.out_sizes, dim=-1)
        return self.o_proj(self.attn(q, k, v, rotation))  # type: ignore[no-any-return]


class LlamaDecoderLayer(DecoderLayer):
    """Attention, then MLP, each after a norm."""

    attention_class: type[LlamaAttention] = LlamaAttention

    def __init__(self, config: ModelConfig, layer_index: int, tp: TPGroup) -> None:
        super().__init__(config, layer_index, tp)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.self_attn = self.attention_class(config, layer_index, tp)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, tp)
        self.mlp = GatedMLP(config, tp)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, rotation)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class LlamaForCausalLM(CausalLM):
    layer_class = LlamaDecoderLayer
