"""Gemma 2 (arXiv:2408.00118): every second layer windowed, soft caps, and norms both before and after each block."""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.models.config import ModelConfig
from eagleray.models.decoder import CausalLM, DecoderLayer
from eagleray.models.layers import GatedMLP, RMSNorm
from eagleray.models.llama import LlamaAttention
from eagleray.parallel.group import TPGroup
from eagleray.parallel.weight_shard import WeightShard, region


class GemmaRMSNorm(RMSNorm):
    """A norm whose weights are kept as their distance from one, and applied in float32."""

    has_kernel = False

    def normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (self.size,), 1.0 + self.weight.float(), self.eps).to(x.dtype)

    def weight_shards(self) -> list[WeightShard]:
        cut = region(range(self.size))
        return [WeightShard(name="weight", shape=(self.size,), region=cut, target=self.weight.detach())]


class Gemma2DecoderLayer(DecoderLayer):
    """Attention, then MLP, each between two norms, of which the second adds up the ranks' parts."""

    hidden_is_part = False

    def __init__(self, config: ModelConfig, layer_index: int, tp: TPGroup) -> None:
        super().__init__(config, layer_index, tp)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = GemmaRMSNorm(size, eps)
        self.self_attn = LlamaAttention(config, layer_index, tp)
        self.post_attention_layernorm = GemmaRMSNorm(size, eps, tp)
        self.pre_feedforward_layernorm = GemmaRMSNorm(size, eps)
        self.mlp = GatedMLP(config, tp)
        self.post_feedforward_layernorm = GemmaRMSNorm(size, eps, tp)

    def forward(
        self, hidden: Tensor, residual: Tensor | None, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden, _ = self.post_attention_layernorm(self.self_attn(hidden, rotation))
        hidden, residual = self.pre_feedforward_layernorm(hidden, residual)
        hidden, _ = self.post_feedforward_layernorm(self.mlp(hidden))
        return hidden, residual


class Gemma2ForCausalLM(CausalLM):
    layer_class = Gemma2DecoderLayer
    norm_class = GemmaRMSNorm

    @staticmethod
    def embedding_scale(config: ModelConfig) -> float | None:
        """The root of the hidden size, rounded to the weights' dtype as in training."""
        return torch.tensor(config.hidden_size**0.5, device="cpu").item()
