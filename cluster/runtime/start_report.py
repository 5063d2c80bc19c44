"""Reports where the time of a start went: two lines for people, figures for programs."""

from collections.abc import Sequence

import msgspec

from eagleray.workers.protocol.startup import GRAPHS, WEIGHTS, Loaded, Ready


class StartReport(msgspec.Struct, frozen=True):
    """Of all ranks; the slowest, or the largest, stands for each figure."""

    seconds: dict[str, float]  # by part, in order
    weight_bytes: int  # of a rank
    num_graphs: int
    graph_bytes: int  # of a rank
    attention: str

    @classmethod
    def of(cls, loaded: Sequence[Loaded], ready: Sequence[Ready]) -> "StartReport":
        """What the ranks know of it."""
        seconds = {part: max(rank.seconds[part] for rank in loaded) for part in loaded[0].seconds}
        num_graphs = ready[0].num_graphs
        graphs = {GRAPHS: max(rank.seconds for rank in ready)} if num_graphs else {}  # no part of a start without them
        return cls(
            seconds=seconds | graphs,
            weight_bytes=max(rank.weight_bytes for rank in loaded),
            num_graphs=num_graphs,
            graph_bytes=max(rank.graph_bytes for rank in ready),
            attention=ready[0].attention,
        )

    def within(self, before: dict[str, float], total: float) -> "StartReport":
        """The report of a whole start: other parts came `before`, and `rest` is what nobody measured."""
        seconds = before | self.seconds
        rest = max(0.0, total - sum(seconds.values()))
        return msgspec.structs.replace(self, seconds=seconds | {"rest": rest})

    def line(self) -> str:
        """`ready in 18.3 s: Ray 3.1, processes and imports 6.0, …`."""
        parts = ", ".join(
            f"{part} {seconds:.1f}{self._remark(part, seconds)}" for part, seconds in self.seconds.items()
        )
        return f"ready in {sum(self.seconds.values()):.1f} s: {parts}"

    def _remark(self, part: str, seconds: float) -> str:
        if part == WEIGHTS:
            size = self.weight_bytes / 1e9
            return f" ({size:.1f} GB, {size / max(seconds, 1e-3):.1f} GB/s)"
        if part == GRAPHS:
            return f" ({self.num_graphs} sizes, {self.graph_bytes / 1e9:.1f} GB)"
        return ""


def capacity(num_blocks: int, block_size: int, attention: str) -> str:
    """`KV cache: 3,210 blocks of 128 tokens (410,880 tokens), attention: …`."""
    tokens = num_blocks * block_size
    return f"KV cache: {num_blocks:,} blocks of {block_size} tokens ({tokens:,} tokens), attention: {attention}"
