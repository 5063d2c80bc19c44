"""Shards against whole layers, in one process: the ranks' results are put together by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.embedding import VocabParallelEmbedding, VocabParallelHead
from eagleray.parallel.group import TPGroup
from eagleray.parallel.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear, head_columns
from eagleray.parallel.sharding import shard_columns, shard_heads
from support.stored import load

SIZES = [1, 2, 3, 4, 6]


def groups(size: int) -> list[TPGroup]:
    return [TPGroup(rank, size) for rank in range(size)]


def test_the_shard_of_one_rank_among_four() -> None:
    layer = ColumnParallelLinear(6, {"gate": 8, "up": 8}, TPGroup(rank=1, size=4))
    gate, up = torch.randn(8, 6), torch.randn(8, 6)
    load(layer, {"parent.gate.weight": gate, "parent.up.weight": up})
    x = torch.randn(5, 6)
    torch.testing.assert_close(layer(x), torch.cat((x @ gate[2:4].T, x @ up[2:4].T), dim=-1))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_columns_of_all_ranks_are_the_whole_layer(size: int, bias: bool) -> None:
    sizes = {"gate": 20, "up": 14}
    tensors = {f"parent.{part}.weight": torch.randn(n, 6) for part, n in sizes.items()}
    if bias:
        tensors |= {f"parent.{part}.bias": torch.randn(n) for part, n in sizes.items()}
    x = torch.randn(5, 6)
    outs: dict[str, list[Tensor]] = {part: [] for part in sizes}
    for tp in groups(size):
        layer = ColumnParallelLinear(6, sizes, tp, bias=bias)
        load(layer, tensors)
        for part, out in zip(sizes, torch.split(layer(x), layer.out_sizes, dim=-1), strict=True):
            outs[part].append(out)
    for part in sizes:
        whole = F.linear(x, tensors[f"parent.{part}.weight"], tensors.get(f"parent.{part}.bias"))
        torch.testing.assert_close(torch.cat(outs[part], dim=-1), whole)


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_has_its_heads_and_replicated_kv_heads_are_equal(size: int) -> None:
    heads, kv_heads, head_size, hidden = 6, 3, 4, 10
    tensors = {}
    for part, rows in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
        tensors[f"parent.{part}.weight"] = torch.randn(rows * head_size, hidden)
        tensors[f"parent.{part}.bias"] = torch.randn(rows * head_size)
    x = torch.randn(5, hidden)
    for tp in groups(size):
        own = shard_heads(heads, kv_heads, tp.rank, tp.size)
        layer = QKVParallelLinear(hidden, heads, kv_heads, head_size, own, bias=True)
        load(layer, tensors)
        outs = torch.split(layer(x), layer.out_sizes, dim=-1)
        for part, out, shard in zip(("q_proj", "k_proj", "v_proj"), outs, (own.query, own.kv, own.kv), strict=True):
            whole = F.linear(x, tensors[f"parent.{part}.weight"], tensors[f"parent.{part}.bias"])
            columns = head_columns(shard, head_size)
            torch.testing.assert_close(out, whole[:, columns.start : columns.stop])


@pytest.mark.parametrize("size", SIZES)
def test_products_of_all_ranks_add_up_to_the_whole_layer(size: int) -> None:
    whole = nn.Linear(20, 7, bias=False)
    x = torch.randn(5, 20)
    total = torch.zeros(5, 7)
    for tp in groups(size):
        own = shard_columns(20, tp.rank, tp.size)
        layer = RowParallelLinear(20, 7, own, tp)
        load(layer, {"parent.layer.weight": whole.weight.detach()})
        total += layer(x[:, own.start : own.stop])
    torch.testing.assert_close(total, whole(x))


@pytest.mark.parametrize("size", SIZES)
def test_a_bias_counts_once(size: int) -> None:
    whole = nn.Linear(20, 7)
    x = torch.randn(5, 20)
    total = torch.zeros(5, 7)
    for tp in groups(size):
        own = shard_columns(20, tp.rank, tp.size)
        layer = RowParallelLinear(20, 7, own, tp, bias=True)
        load(layer, {"parent.layer.weight": whole.weight.detach(), "parent.layer.bias": whole.bias.detach()})
        total += layer(x[:, own.start : own.stop])
    torch.testing.assert_close(total, whole(x))


@pytest.mark.parametrize("size", SIZES)
def test_the_vocabulary_is_shared_by_rows(size: int) -> None:
    vocab, hidden = 131, 6
    weight = torch.randn(vocab, hidden)
    ids = torch.cat((torch.randperm(vocab), torch.tensor([0, 0])))
    x = torch.randn(4, hidden)
    embedded, logits = torch.zeros(len(ids), hidden), []
    for tp in groups(size):
        layer = VocabParallelEmbedding(vocab, hidden, tp)
        load(layer, {"parent.layer.weight": weight})
        rows, mine = layer(ids), torch.tensor([int(token) in layer.own for token in ids])
        assert torch.equal(rows[~mine], torch.zeros(int((~mine).sum()), hidden))
        embedded += rows
        head = VocabParallelHead(vocab, hidden, tp)
        load(head, {"parent.layer.weight": weight})
        assert head.own == layer.own
        torch.testing.assert_close(head.logits(x), layer.logits(x))
        logits.append(head.logits(x))
    assert torch.equal(embedded, weight[ids])
    torch.testing.assert_close(torch.cat(logits, dim=-1), x @ weight.T)


def test_a_tensor_of_another_shape_is_refused() -> None:
    layer = VocabParallelHead(8, 6, TPGroup())
    with pytest.raises(ValueError, match=r"has shape \[8, 5\], but the model needs \[8, 6\]"):
        load(layer, {"parent.layer.weight": torch.zeros(8, 5)})
