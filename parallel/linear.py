"""Linear layers of which each rank owns some output columns, or some input rows."""

from collections.abc import Mapping

from torch import Tensor, nn

from eagleray.parallel.group import TPGroup
from eagleray.parallel.sharding import HeadShard, shard_columns
from eagleray.parallel.weight import DenseWeight, WeightFactory
from eagleray.parallel.weight_shard import Dim, Outputs, WeightShard, parameter, stacked_shards


class _Linear(nn.Module):
    """`y = x W^T + b`, for several layers at once if they read the same input: their outputs stand side by side."""

    def __init__(self, outputs: Outputs, inputs: Dim, bias: bool, make_weight: WeightFactory) -> None:
        super().__init__()
        self.outputs = outputs
        self.out_sizes = [len(columns.own) for columns in outputs.values()]  # of this rank, for `split`
        self.weight = make_weight(outputs, inputs)
        self.bias = parameter(sum(self.out_sizes)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., sum(out_sizes)]`."""
        return self.weight.linear(x, self.bias)

    def weight_shards(self) -> list[WeightShard]:
        biases = [] if self.bias is None else stacked_shards(self.bias, "bias", self.outputs)
        return self.weight.shards() + biases


class ColumnParallelLinear(_Linear):
    """Named parts, each shared among the ranks by its output columns: `{"gate_proj": 8, "up_proj": 8}`."""

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        tp: TPGroup,
        *,
        bias: bool = False,
        make_weight: WeightFactory = DenseWeight,
    ) -> None:
        outputs: Outputs = {name: Dim(size, shard_columns(size, tp.rank, tp.size)) for name, size in parts.items()}
        super().__init__(outputs, Dim.whole(in_features), bias, make_weight)

    def silu_gated(self, x: Tensor) -> Tensor | None:
        """`silu(gate) * up` of two parts, `[n, in]` to `[n, out_sizes[0]]`, or `None` (`Weight.silu_gated`)."""
        return self.weight.silu_gated(x) if self.bias is None else None


class QKVParallelLinear(_Linear):
    """`q_proj`, `k_proj` and `v_proj` in one, shared among the ranks by attention heads."""

    def __init__(
        self,
        in_features: int,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        heads: HeadShard,
        *,
        bias: bool,
        make_weight: WeightFactory = DenseWeight,
    ) -> None:
        query = Dim(num_heads * head_size, head_columns(heads.query, head_size))
        kv = Dim(num_kv_heads * head_size, head_columns(heads.kv, head_size))
        super().__init__({"q_proj": query, "k_proj": kv, "v_proj": kv}, Dim.whole(in_features), bias, make_weight)


class RowParallelLinear(_Linear):
    """`y = x W^T + b` where each rank holds the columns `own` of the input.

    What comes out is this rank's part of `y`: the norm that follows adds up the parts of all ranks (`RMSNorm`), in one
    launch where it can. Every rank holds the bias, and the first one's part has it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        own: range,
        tp: TPGroup,
        *,
        bias: bool = False,
        make_weight: WeightFactory = DenseWeight,
    ) -> None:
        super().__init__({None: Dim.whole(out_features)}, Dim(in_features, own), bias, make_weight)
        self.adds_bias = tp.rank == 0

    def forward(self, x: Tensor) -> Tensor:
        """`[..., len(own)]` to this rank's part of `[..., out_features]`."""
        return self.weight.linear(x, self.bias if self.adds_bias else None)


def head_columns(heads: range, head_size: int) -> range:
    """Where these heads stand in a row of all heads' values."""
    return range(heads.start * head_size, heads.stop * head_size)
