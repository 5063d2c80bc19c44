"""Qwen2, a Llama with biases on q, k and v (`ModelConfig.qkv_bias`), and Qwen3, which norms each head of q and k."""

from torch import Tensor

from eagleray.models.config import ModelConfig
from eagleray.models.layers import RMSNorm
from eagleray.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from eagleray.parallel.group import TPGroup


class Qwen2ForCausalLM(LlamaForCausalLM):
    pass


class Qwen3Attention(LlamaAttention):
    """The norms run over each head by itself, before the rotation."""

    def __init__(self, config: ModelConfig, layer_index: int, tp: TPGroup) -> None:
        super().__init__(config, layer_index, tp)
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = self.qkv_proj(hidden).split(self.qkv_proj.out_sizes, dim=-1)
        q, k = _norm_heads(self.q_norm, q), _norm_heads(self.k_norm, k)
        return self.o_proj(self.attn(q, k, v, rotation))  # type: ignore[no-any-return]


def _norm_heads(norm: RMSNorm, x: Tensor) -> Tensor:
    return norm.normalize(x.view(*x.shape[:-1], -1, norm.size)).flatten(-2)


class Qwen3DecoderLayer(LlamaDecoderLayer):
    attention_class = Qwen3Attention


class Qwen3ForCausalLM(LlamaForCausalLM):
    layer_class = Qwen3DecoderLayer
