"""The plain implementation of attention against one token at a time in numpy, and the context that it reads."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers import attention
from eagleray.workers.context import AttentionMetadata, LayerContext, current_layer, forward_context, scratch

BLOCK_SIZE = 4
MIXED = [(1, 9), (6, 6), (1, 1), (3, 17), (1, 30), (20, 23)]  # (tokens in this batch, tokens of the request)
Array = np.ndarray[Any, np.dtype[np.float64]]


class Requests:
    """A batch of requests with random queries, keys and values, and a paged cache that holds what came before."""

    def __init__(self, lengths: Sequence[tuple[int, int]], spec: AttentionSpec, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.spec = spec
        self.kv = [
            torch.randn(2, seq_len, spec.num_kv_heads, spec.head_size, generator=generator) for _, seq_len in lengths
        ]
        self.queries = [torch.randn(n, spec.num_heads, spec.head_size, generator=generator) for n, _ in lengths]
        num_blocks = [-(-seq_len // BLOCK_SIZE) for _, seq_len in lengths]
        blocks = torch.randperm(sum(num_blocks) + 3, generator=generator)
        table = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
        # What nobody wrote is huge, so that reading it spoils the result.
        self.cache = torch.full((2, len(blocks), BLOCK_SIZE, spec.num_kv_heads, spec.head_size), 1e6)
        slots = []
        for i, (n, seq_len) in enumerate(lengths):
            own = blocks[sum(num_blocks[:i]) : sum(num_blocks[: i + 1])]
            table[i, : len(own)] = own
            every_slot = (own[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:seq_len]
            self.cache.flatten(1, 2)[:, every_slot[: seq_len - n]] = self.kv[i][:, : seq_len - n]
            slots.append(every_slot[seq_len - n :])
        self.metadata = AttentionMetadata(
            query_start_loc=torch.tensor([0, *accumulate(n for n, _ in lengths)], dtype=torch.int32),
            seq_lens=torch.tensor([seq_len for _, seq_len in lengths], dtype=torch.int32),
            slot_mapping=torch.cat(slots),
            block_table=table,
            max_query_len=max(n for n, _ in lengths),
            max_seq_len=max(seq_len for _, seq_len in lengths),
        )

    def run(self, padding: int = 0) -> Tensor:
        """Through the op, as a model calls it."""
        q = torch.cat([*self.queries, self.queries[0].new_ones(padding, *self.queries[0].shape[1:])])
        new = [kv[:, -len(q) :] for kv, q in zip(self.kv, self.queries, strict=True)]
        k, v = (torch.cat([kv[side] for kv in new] + [new[0].new_ones(padding, *new[0].shape[2:])]) for side in (0, 1))
        with forward_context([LayerContext(self.metadata, self.cache, self.spec)]):
            out: Tensor = torch.ops.eagleray.attention(q, k, v, 0)
        return out

    def expected(self) -> Tensor:
        out = [
            attend(query.double().numpy(), kv[:, : kv.shape[1] - len(queries) + i + 1].double().numpy(), self.spec)
            for queries, kv in zip(self.queries, self.kv, strict=True)
            for i, query in enumerate(queries)
        ]
        return torch.from_numpy(np.stack(out)).float()


def attend(query: Array, kv: Array, spec: AttentionSpec) -> Array:
    """One query, `[heads, head_size]`, the last of the tokens in `kv`, in float64 by the definition."""
    keys, values = kv if spec.sliding_window is None else kv[:, -spec.sliding_window :]
    out = np.empty_like(query)
    for head in range(spec.num_heads):
        kv_head = head * spec.num_kv_heads // spec.num_heads
        scores = keys[:, kv_head] @ query[head] * spec.scale
        if spec.logits_soft_cap is not None:
            scores = np.tanh(scores / spec.logits_soft_cap) * spec.logits_soft_cap
        weights = np.exp(scores - scores.max())
        out[head] = weights / weights.sum() @ values[:, kv_head]
    return out


def spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 2, "head_size": 8, "scale": 0.4, **changes})


SPECS = {
    "plain": spec(),
    "one query head per KV head": spec(num_heads=3, num_kv_heads=3),
    "window": spec(sliding_window=5),
    "window of one token": spec(sliding_window=1),
    "soft cap": spec(logits_soft_cap=0.7),
    "window and soft cap": spec(sliding_window=6, logits_soft_cap=0.7),
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(
    "lengths",
    [[(1, 9)], [(1, 7), (1, 1), (1, 20)], [(1, 300), (1, 9), (3, 40), (1, 290)], [(13, 13)], [(5, 18)], MIXED],
)
def test_the_op_computes_attention(name: str, lengths: list[tuple[int, int]]) -> None:
    requests = Requests(lengths, SPECS[name])
    torch.testing.assert_close(requests.run(), requests.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "window", "window and soft cap"])
def test_a_slice_longer_than_what_is_attended_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES_AT_ONCE", 4)
    requests = Requests([(21, 30), (1, 5), (4, 4)], SPECS[name])
    torch.testing.assert_close(requests.run(), requests.expected(), atol=1e-5, rtol=1e-5)


def test_a_request_does_not_feel_the_others() -> None:
    together = Requests(MIXED, spec(sliding_window=5)).run()
    for i, (first, n) in enumerate(zip(accumulate([0] + [n for n, _ in MIXED]), [n for n, _ in MIXED], strict=False)):
        alone = Requests(MIXED, spec(sliding_window=5))
        begin, end = first, first + n
        alone.metadata = AttentionMetadata(
            torch.tensor([0, n], dtype=torch.int32),
            alone.metadata.seq_lens[i : i + 1],
            alone.metadata.slot_mapping[begin:end],
            alone.metadata.block_table[i : i + 1],
            n,
            MIXED[i][1],
        )
        alone.queries, alone.kv = [alone.queries[i]], [alone.kv[i]]
        torch.testing.assert_close(alone.run(), together[begin:end], atol=1e-6, rtol=1e-6)


def test_padding_is_not_written_and_gives_zero() -> None:
    requests = Requests(MIXED, spec())
    out = requests.run(padding=3)
    torch.testing.assert_close(out[:-3], requests.expected(), atol=1e-5, rtol=1e-5)
    assert torch.equal(out[-3:], torch.zeros_like(out[-3:]))


def test_requests_without_tokens_are_passed_over() -> None:
    requests = Requests(MIXED, spec())
    rested = requests.metadata
    requests.metadata = AttentionMetadata(
        torch.cat((rested.query_start_loc, rested.query_start_loc[-1:])),
        torch.cat((rested.seq_lens, torch.tensor([5], dtype=torch.int32))),
        rested.slot_mapping,
        torch.cat((rested.block_table, torch.zeros_like(rested.block_table[:1]))),
        rested.max_query_len,
        rested.max_seq_len,
    )
    torch.testing.assert_close(requests.run(), requests.expected(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cap", [None, 0.7])
def test_bfloat16_is_accumulated_in_float32(cap: float | None) -> None:
    requests = Requests(MIXED, spec(logits_soft_cap=cap))
    requests.queries = [q.bfloat16() for q in requests.queries]
    requests.kv = [kv.bfloat16() for kv in requests.kv]
    requests.cache = requests.cache.bfloat16()
    out = requests.run()
    assert out.dtype == torch.bfloat16
    # Half a unit in the last of bfloat16's 8 bits, of values up to 4.
    torch.testing.assert_close(out.float(), requests.expected(), atol=2**-7, rtol=2**-7)


def test_a_forward_pass_without_context_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="only inside `with forward_context"):
        current_layer(0)


def test_contexts_are_never_nested_and_end_with_their_block() -> None:
    layer = LayerContext(Requests(MIXED, spec()).metadata, torch.empty(0), spec())
    with forward_context([layer]):
        assert current_layer(0) is layer
        with pytest.raises(RuntimeError, match="has 1 layers, so no layer 1"):
            current_layer(1)
        with pytest.raises(RuntimeError, match="never nested"), forward_context([layer]):
            pass
        assert current_layer(0) is layer
    with pytest.raises(RuntimeError, match="only inside"):
        current_layer(0)


def test_an_error_in_a_forward_pass_ends_its_context() -> None:
    with pytest.raises(ZeroDivisionError), forward_context([]):
        raise ZeroDivisionError
    with forward_context([]):
        pass


def test_layers_share_what_they_work_out_until_the_pass_ends() -> None:
    with forward_context([]):
        scratch()["masks"] = 1
        assert scratch() == {"masks": 1}
    with forward_context([]):
        assert scratch() == {}
    scratch()["masks"] = 1
    assert scratch() == {}


def test_layers_with_and_without_a_window_each_have_their_own_plan() -> None:
    requests = [Requests(MIXED, SPECS[name]) for name in ("plain", "window", "plain")]
    metadata = requests[0].metadata
    layers = [LayerContext(metadata, request.cache, request.spec) for request in requests]
    with forward_context(layers):
        for index, request in enumerate(requests):
            new = [kv[:, -len(q) :] for kv, q in zip(request.kv, request.queries, strict=True)]
            k, v = (torch.cat([kv[side] for kv in new]) for side in (0, 1))
            out = torch.ops.eagleray.attention(torch.cat(request.queries), k, v, index)
            torch.testing.assert_close(out, request.expected(), atol=1e-5, rtol=1e-5)
