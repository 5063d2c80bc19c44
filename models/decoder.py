"""The decoder that all families share: embedding, a stack of layers, a norm, a head."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from eagleray.models.attention import attention_layers
from eagleray.models.config import ModelConfig
from eagleray.models.layers import RMSNorm, Rotary
from eagleray.models.weights import vocab_weight
from eagleray.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from eagleray.parallel.group import TPGroup


class DecoderLayer(nn.Module):
    """One layer: `(hidden, residual, rotation)` to `(hidden, residual)`, where their sum is the residual stream.

    `hidden` comes and goes as each rank's part of a sum, unless a family ends its layers with a norm and says so.
    """

    hidden_is_part: ClassVar[bool] = True

    def __init__(self, config: ModelConfig, layer_index: int, tp: TPGroup) -> None:
        super().__init__()


class Decoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(
        self, config: ModelConfig, tp: TPGroup, layer: type[DecoderLayer], norm: type[RMSNorm], scale: float | None
    ) -> None:
        super().__init__()
        self.embedding_scale = scale
        self.hidden_tp = (
            tp if layer.hidden_is_part else TPGroup()
        )  # the ranks that add up what goes from layer to layer
        make_weight = vocab_weight(config)
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size, tp, make_weight=make_weight)
        self.layers = nn.ModuleList(layer(config, index, tp) for index in range(config.num_layers))
        self.norm = norm(config.hidden_size, config.rms_norm_eps, self.hidden_tp)
        self.rotary = Rotary(config.head_size, config.max_position_embeddings, config.rope)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        hidden, residual = self.embed_tokens(input_ids), None
        if self.hidden_tp.size == 1:
            hidden = self.embed_tokens.tp.all_reduce(hidden)
        if self.embedding_scale is not None:
            hidden = hidden * self.embedding_scale
        rotation = self.rotary(positions)
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, rotation)
        hidden, _ = self.norm(hidden, residual)
        return hidden  # type: ignore[no-any-return]


class CausalLM(nn.Module):
    """A language model: one rank's shard of it. A family names its layer, its norm, and how it scales embeddings."""

    layer_class: ClassVar[type[DecoderLayer]]
    norm_class: ClassVar[type[RMSNorm]] = RMSNorm

    def __init__(self, config: ModelConfig, tp: TPGroup) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, tp, self.layer_class, self.norm_class, self.embedding_scale(config))
        self.lm_head: VocabParallelHead = (
            self.model.embed_tokens
            if config.tie_word_embeddings
            else VocabParallelHead(config.vocab_size, config.hidden_size, tp, make_weight=vocab_weight(config))
        )
        self.attentions = attention_layers(self)  # found once, since every step asks them for what they carry

    @staticmethod
    def embedding_scale(config: ModelConfig) -> float | None:
        """What embeddings are multiplied by, if anything."""
        return None

    @property
    def vocab_shard(self) -> range:
        """The token ids whose logits this rank computes."""
        return self.lm_head.own

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of hidden states; weights may be kept in another."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """`input_ids` and `positions`, `[tokens]` int64, to `[tokens, hidden_size]`, equal on all ranks."""
        return self.model(input_ids, positions)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden_size]` to `[n, len(vocab_shard)]` float32."""
        return self.finish(self.lm_head.logits(hidden))

    def raw_logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """`[n, hidden_size]` to `[n, len(vocab_shard)]` in the model's dtype, in `out` if given, for `finish`."""
        return self.lm_head.logits(hidden, out)

    def finish(self, raw: Tensor) -> Tensor:
        """The logits, float32, that `raw` ones stand for. What is not finite stays so under a soft cap, as NaN."""
        logits, cap = raw.float(), self.config.final_soft_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap + 0 * logits
