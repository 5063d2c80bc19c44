"""Linear layers of which each rank owns some output columns, or some input rows."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import HAS_TRITON
from eagleray.parallel.sharding import HeadShard, shard_columns
from eagleray.parallel.weight_shard import WeightShard, parameter, region

if HAS_TRITON:
    from eagleray.parallel import skinny


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`x W^T + b`, whichever way is the fastest; in `out` if given, and then without a bias."""
    if x.is_cuda and skinny.takes(x, weight):
        return skinny.linear(x, weight, bias, out)
    if out is not None:
        return torch.mm(x, weight.t(), out=out)
    return F.linear(x, weight, bias)


class Part(NamedTuple):
    """One of the layers that are merged into one: how many outputs it has, and which of them are this rank's."""

    size: int
    own: range


class _MergedColumns(nn.Module):
    """`y = x W^T + b` for several layers at once that read the same input; the parts' outputs stand side by side."""

    def __init__(self, in_features: int, parts: Mapping[str, Part], bias: bool) -> None:
        super().__init__()
        self.parts = dict(parts)
        self.in_features = in_features
        self.out_sizes = [len(part.own) for part in parts.values()]  # of this rank, for `split`
        self.weight = parameter(sum(self.out_sizes), in_features)
        self.bias = parameter(sum(self.out_sizes)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., sum(out_sizes)]`."""
        return linear(x, self.weight, self.bias)

    def weight_shards(self) -> list[WeightShard]:
        shards: list[WeightShard] = []
        every_input = range(self.in_features)
        weights = torch.split(self.weight.detach(), self.out_sizes)
        for (name, part), target in zip(self.parts.items(), weights, strict=True):
            shape = (part.size, self.in_features)
            cut = region(part.own, every_input)
            shards.append(WeightShard(part=name, name="weight", shape=shape, region=cut, target=target))
        if self.bias is not None:
            biases = torch.split(self.bias.detach(), self.out_sizes)
            for (name, part), target in zip(self.parts.items(), biases, strict=True):
                cut = region(part.own)
                shards.append(WeightShard(part=name, name="bias", shape=(part.size,), region=cut, target=target))
        return shards


class ColumnParallelLinear(_MergedColumns):
    """Named parts, each shared among the ranks by its output columns: `{"gate_proj": 8, "up_proj": 8}`."""

    def __init__(self, in_features: int, parts: Mapping[str, int], tp: TPGroup, *, bias: bool = False) -> None:
        own = {name: Part(size, shard_columns(size, tp.rank, tp.size)) for name, size in parts.items()}
        super().__init__(in_features, own, bias)


class QKVParallelLinear(_MergedColumns):
    """`q_proj`, `k_proj` and `v_proj` in one, shared among the ranks by attention heads."""

    def __init__(
        self, in_features: int, num_heads: int, num_kv_heads: int, head_size: int, heads: HeadShard, *, bias: bool
    ) -> None:
        query = Part(num_heads * head_size, head_columns(heads.query, head_size))
        kv = Part(num_kv_heads * head_size, head_columns(heads.kv, head_size))
        super().__init__(in_features, {"q_proj": query, "k_proj": kv, "v_proj": kv}, bias)


class RowParallelLinear(nn.Module):
    """`y = x W^T + b` where each rank holds the columns `own` of the input.

    What comes out is this rank's part of `y`: the norm that follows adds up the parts of all ranks (`RMSNorm`), in one
    launch where it can. Every rank holds the bias, and the first one's part has it.
    """

    def __init__(self, in_features: int, out_features: int, own: range, tp: TPGroup, *, bias: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.own = in_features, out_features, own
        self.weight = parameter(out_features, len(own))
        self.bias = parameter(out_features) if bias else None
        self.adds_bias = tp.rank == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., len(own)]` to this rank's part of `[..., out_features]`."""
        return linear(x, self.weight, self.bias if self.adds_bias else None)

    def weight_shards(self) -> list[WeightShard]:
        every_output = range(self.out_features)
        shape = (self.out_features, self.in_features)
        cut = region(every_output, self.own)
        shards = [WeightShard(name="weight", shape=shape, region=cut, target=self.weight.detach())]
        if self.bias is not None:
            cut = region(every_output)
            shards.append(WeightShard(name="bias", shape=(self.out_features,), region=cut, target=self.bias.detach()))
        return shards


def head_columns(heads: range, head_size: int) -> range:
    """Where these heads stand in a row of all heads' values."""
    return range(heads.start * head_size, heads.stop * head_size)
