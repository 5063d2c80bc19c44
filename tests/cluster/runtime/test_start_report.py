"""The lines about a start, made of what each rank measured."""

from eagleray.cluster.runtime.start_report import StartReport, capacity
from eagleray.workers.protocol.startup import Loaded, Ready

LOADED = [
    Loaded(100, {"joining": 1.0, "weights": 4.0, "memory profile": 1.5}, 16_000_000_000),
    Loaded(90, {"joining": 1.2, "weights": 3.0, "memory profile": 1.4}, 15_000_000_000),
]
READY = [Ready(2.2, 37, 1_100_000_000, "FlashAttention-3"), Ready(2.0, 37, 1_000_000_000, "FlashAttention-3")]


def test_the_slowest_rank_counts_for_each_part_and_the_parts_add_up() -> None:
    report = StartReport.of(LOADED, READY).within({"Ray": 3.1, "processes and imports": 6.0}, 18.3)
    assert report.line() == (
        "ready in 18.3 s: Ray 3.1, processes and imports 6.0, joining 1.2, weights 4.0 (16.0 GB, 4.0 GB/s), "
        "memory profile 1.5, graphs 2.2 (37 sizes, 1.1 GB), rest 0.3"
    )


def test_without_graphs_none_are_mentioned() -> None:
    report = StartReport.of(LOADED, [Ready(0.1, 0, 0, "plain PyTorch")]).within({"Ray": 3.0}, 10.0)
    assert report.line() == (
        "ready in 10.0 s: Ray 3.0, joining 1.2, weights 4.0 (16.0 GB, 4.0 GB/s), memory profile 1.5, rest 0.3"
    )


def test_the_room_is_told_in_tokens() -> None:
    assert capacity(3210, 128, "Triton decode + FlashAttention-3") == (
        "KV cache: 3,210 blocks of 128 tokens (410,880 tokens), attention: Triton decode + FlashAttention-3"
    )
