"""A weight that is kept in another form takes the dense one's place in every layer, and gives the same numbers.

It computes with the matrix that its bytes stand for, as the dense one does with what it has loaded: to the bit.
"""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from eagleray.parallel.sharding import shard_columns, shard_heads
from eagleray.parallel.weight import DenseWeight, WeightFactory
from eagleray.parallel.weight_shard import Dim
from support.row_scaled_weight import RowScaledWeight, dense, quantized
from support.stored import load

SIZES = [1, 2, 3]
GROUPS = [TPGroup(rank, size) for size in SIZES for rank in range(size)]
BOTH: list[WeightFactory] = [RowScaledWeight, DenseWeight]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_columns_of_all_ranks_are_the_whole_layer(size: int, bias: bool) -> None:
    parts = {"gate": 20, "up": 14}
    tensors = quantized({f"parent.{part}.weight": torch.empty(n, 6) for part, n in parts.items()})
    if bias:
        tensors |= {f"parent.{part}.bias": torch.randn(n) for part, n in parts.items()}
    x, whole = torch.randn(5, 6), dense(tensors)
    outs: dict[str, list[Tensor]] = {part: [] for part in parts}
    for rank in range(size):
        layer = ColumnParallelLinear(6, parts, TPGroup(rank, size), bias=bias, make_weight=RowScaledWeight)
        load(layer, tensors)
        for part, out in zip(parts, torch.split(layer(x), layer.out_sizes, dim=-1), strict=True):
            outs[part].append(out)
    for part in parts:
        expected = F.linear(x, whole[f"parent.{part}.weight"], whole.get(f"parent.{part}.bias"))
        torch.testing.assert_close(torch.cat(outs[part], dim=-1), expected)


@pytest.mark.parametrize("tp", GROUPS)
def test_heads(tp: TPGroup) -> None:
    heads = shard_heads(6, 3, tp.rank, tp.size)
    scaled, plain = (QKVParallelLinear(10, 6, 3, 4, heads, bias=True, make_weight=each) for each in BOTH)
    rows = {"q_proj": 24, "k_proj": 12, "v_proj": 12}
    tensors = quantized({f"parent.{part}.weight": torch.empty(n, 10) for part, n in rows.items()})
    tensors |= {f"parent.{part}.bias": torch.randn(n) for part, n in rows.items()}
    load(scaled, tensors)
    load(plain, dense(tensors))
    x = torch.randn(5, 10)
    assert torch.equal(scaled(x), plain(x))


@pytest.mark.parametrize("tp", GROUPS)
def test_rows(tp: TPGroup) -> None:
    own = shard_columns(20, tp.rank, tp.size)
    scaled, plain = (RowParallelLinear(20, 7, own, tp, bias=True, make_weight=each) for each in BOTH)
    tensors = quantized({"parent.layer.weight": torch.empty(7, 20), "parent.layer.bias": torch.randn(7)})
    load(scaled, tensors)
    load(plain, dense(tensors))
    x = torch.randn(5, len(own))
    assert torch.equal(scaled(x), plain(x))


@pytest.mark.parametrize("tp", GROUPS)
def test_the_embedding_and_the_head(tp: TPGroup) -> None:
    tensors = quantized({"parent.layer.weight": torch.empty(131, 6)})
    ids, hidden = torch.randperm(131), torch.randn(4, 6)
    scaled, plain = (VocabParallelEmbedding(131, 6, tp, make_weight=each) for each in BOTH)
    head = VocabParallelHead(131, 6, tp, make_weight=RowScaledWeight)
    load(scaled, tensors)
    load(head, tensors)
    load(plain, dense(tensors))
    assert torch.equal(scaled(ids), plain(ids))
    for layer in (scaled, head):
        out = torch.empty(4, len(layer.own))
        assert layer.logits(hidden, out) is out
        torch.testing.assert_close(out, plain.logits(hidden))


def test_an_answer_goes_where_the_caller_wants_it() -> None:
    weight = DenseWeight({None: Dim.whole(3)}, Dim.whole(5))
    x, out = torch.randn(2, 5), torch.empty(2, 3)
    torch.nn.init.normal_(weight.matrix)
    assert weight.linear(x, out=out) is out
    torch.testing.assert_close(out, weight.linear(x))
