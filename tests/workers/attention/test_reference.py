"""The plain implementation of attention against one token at a time in numpy."""

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention import reference
from eagleray.workers.attention.context import AttentionMetadata, ForwardContext, forward_context
from support.attention_requests import Requests

MIXED = [(1, 9), (6, 6), (1, 1), (3, 17), (1, 30), (20, 23)]  # (tokens in this batch, tokens of the request)


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


@pytest.mark.parametrize("name", SPECS)
def test_sinks_join_the_softmax(name: str) -> None:
    """Each head's own: from one that takes nothing to one that takes all."""
    requests = Requests(MIXED, SPECS[name])
    sinks = torch.linspace(-10, 20, requests.spec.num_heads)
    torch.testing.assert_close(requests.run(sinks=sinks), requests.expected(sinks), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["plain", "window", "window and soft cap"])
def test_a_chunk_longer_than_what_is_attended_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_QUERIES_AT_ONCE", 4)
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


def test_layers_with_and_without_a_window_each_have_their_own_plan() -> None:
    requests = [Requests(MIXED, SPECS[name]) for name in ("plain", "window", "plain")]
    layers = [replace(request.layer(), metadata=requests[0].metadata) for request in requests]
    with forward_context(ForwardContext(layers)):
        for index, request in enumerate(requests):
            new = [kv[:, -len(q) :] for kv, q in zip(request.kv, request.queries, strict=True)]
            k, v = (torch.cat([kv[side] for kv in new]) for side in (0, 1))
            out = torch.ops.eagleray.attention(torch.cat(request.queries), k, v, index)
            torch.testing.assert_close(out, request.expected(), atol=1e-5, rtol=1e-5)
