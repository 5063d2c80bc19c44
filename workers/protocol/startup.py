"""What a rank reports while it starts. Importing this needs no torch."""

from collections.abc import Callable

import msgspec

# The phases of a start, in order; the first two and the last are known without the ranks. Only a model of the hub is
# fetched.
RAY, PROCESSES, FETCHING, JOINING, WEIGHTS = "Ray", "processes and imports", "fetching", "joining", "weights"
MEMORY_PROFILE, GRAPHS, READY = "memory profile", "graphs", "ready"
PHASES = (RAY, PROCESSES, FETCHING, JOINING, WEIGHTS, MEMORY_PROFILE, GRAPHS, READY)


class Progress(msgspec.Struct, frozen=True):
    """How far a start is. A `total` of 0 says that nobody counts what this phase does."""

    phase: str  # one of PHASES
    done: int = 0  # bytes of weights
    total: int = 0


OnProgress = Callable[[Progress], None]


def unheard(_: Progress) -> None:
    """The `OnProgress` of a start that nobody watches."""


class RankHost(msgspec.Struct, frozen=True):
    """Where a rank runs."""

    node_id: str
    ip: str
    pid: int
    store_ip: str  # of the store through which the ranks meet; rank 0 opens it
    store_port: int | None
    niceness: int  # 0 unless Ray's workers are given a lower priority, and may not change that
    needed_bytes: int  # of memory: of its GPU, or of its node
    memory_bytes: int  # that there are; for all ranks of the node, if it is the node's


class Loaded(msgspec.Struct, frozen=True):
    """A rank has joined the others and holds its weights."""

    num_blocks: int  # of KV cache that fit
    seconds: dict[str, float]  # by part of the start
    weight_bytes: int


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """A rank waits for its first step. Until then it only beats."""

    seconds: float  # for the KV cache and the decode graphs
    num_graphs: int
    graph_bytes: int
    attention: str  # how layers attend, in words
