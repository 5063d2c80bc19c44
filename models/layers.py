"""The layers that families share: norms, rotary positions, the gated MLP."""

import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.models.config import ModelConfig, RopeConfig
from eagleray.models.weights import linear_weight
from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import ColumnParallelLinear, RowParallelLinear
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.parallel.sharding import shard_columns
from eagleray.parallel.weight_shard import WeightShard, parameter, region

if HAS_TRITON:
    from eagleray.models import kernels
    from eagleray.parallel import low_latency_reduce


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension (Zhang and Sennrich, arXiv:1910.07467).

    With a group, what comes in is each rank's part of a sum, as the layers before a norm leave it.
    """

    has_kernel: ClassVar[bool] = True  # whether there is one for this norm

    def __init__(self, size: int, eps: float, tp: TPGroup | None = None) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.tp = tp or TPGroup()
        self.weight = parameter(size)
        self._in_kernel = self.has_kernel and platform_of(self.weight.device).compiles_kernels

    def normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.size,), self.weight, self.eps)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Add all ranks' parts `x` to the residual stream; return the norm of the sum, and the sum."""
        if self._in_kernel:
            if self.tp.size > 1 and x.shape[0] <= low_latency_reduce.MAX_ROWS:
                return self.tp.all_reduce_rms_norm(x, residual, self.weight, self.eps)
            return kernels.add_rms_norm(self.tp.add_up(x), residual, self.weight, self.eps)
        x = self.tp.all_reduce(x)
        residual = x if residual is None else x + residual
        return self.normalize(residual), residual

    def weight_shards(self) -> list[WeightShard]:
        cut = region(range(self.size))
        return [WeightShard(name="weight", shape=(self.size,), region=cut, target=self.weight.detach(), mean=1.0)]


class Rotary(nn.Module):
    """Rotary position embedding (Su and others, arXiv:2104.09864), each head split into halves."""

    def __init__(self, head_size: int, max_positions: int, rope: RopeConfig) -> None:
        super().__init__()
        cos, sin = tables(head_size, max_positions, rope)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of `positions`, both `[tokens, 1, head_size]` float32, for `rotate`."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def tables(head_size: int, max_positions: int, rope: RopeConfig) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, both `[max_positions, head_size]` float32.

    On the meta device they are made and not computed: arithmetic there imports torch's compiler, a second or two.
    """
    if torch.get_default_device().type == "meta":
        cos, sin = torch.empty(2, max_positions, head_size, dtype=torch.float32)
        return cos, sin
    angles = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1) * frequencies(head_size, rope)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each of `heads`, `[tokens, heads, head_size]`, by its token's position."""
    cos, sin = rotation
    values = heads.float()
    swapped = values.roll(cos.shape[-1] // 2, dims=-1)  # the halves change places; the sign is in the sine
    return torch.addcmul(values * cos, swapped, sin).to(heads.dtype)


def frequencies(head_size: int, rope: RopeConfig) -> Tensor:
    """Radians per position of each pair of values: `[head_size / 2]` float32."""
    exponents = torch.arange(0, head_size, 2, dtype=torch.int64).float() / head_size
    freqs = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return freqs / rope.factor
    if rope.kind == "llama3":
        return _llama3(freqs, rope)
    return freqs


def _llama3(freqs: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1: slow down long wavelengths by `factor`, keep short ones, and blend in between.

    Source: meta-llama/llama-models, `apply_scaling` in models/llama3/reference_impl/model.py.
    """
    turns = rope.original_max_position_embeddings * freqs / (2 * math.pi)  # within the original context
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * freqs / rope.factor + smooth * freqs


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # by their names in transformers
    "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
}


class GatedMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, with gate and up merged; `config.activation` is one of `ACTIVATIONS`."""

    def __init__(self, config: ModelConfig, tp: TPGroup) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.activation = config.activation
        parts, make_weight = {"gate_proj": inner, "up_proj": inner}, linear_weight(config)
        self.gate_up_proj = ColumnParallelLinear(hidden, parts, tp, bias=bias, make_weight=make_weight)
        own = shard_columns(inner, tp.rank, tp.size)
        self.down_proj = RowParallelLinear(inner, hidden, own, tp, bias=bias, make_weight=make_weight)
        self._in_kernel = self.activation == "silu" and platform_of(torch.get_default_device()).compiles_kernels

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]` to this rank's part of the same."""
        merged = self.gate_up_proj
        if self._in_kernel:
            gated = merged.silu_gated(x)
            return self.down_proj(kernels.silu_mul(merged(x)) if gated is None else gated)  # type: ignore[no-any-return]
        gate, up = merged(x).chunk(2, dim=-1)
        return self.down_proj(ACTIVATIONS[self.activation](gate) * up)  # type: ignore[no-any-return]
