"""What a rank has from the first, before it knows a model or a device. Importing this needs no torch."""

from dataclasses import dataclass

from eagleray.workers.heartbeat import Heartbeat
from eagleray.workers.protocol.channel import Endpoint
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.startup_reporter import StartupReporter


@dataclass(frozen=True)
class Place:
    """Where a rank runs, and as which one of how many."""

    rank: int
    size: int
    generation: int  # how often the engine's ranks were started before; part of the name of their group
    node_id: str
    node_ip: str
    gpu: int | None = None  # torch's index; None on the host


class RankStart:
    """A rank that was told what to be. Its heart beats from now on."""

    def __init__(self, place: Place, config: WorkerConfig, listener: Endpoint, hub: Endpoint) -> None:
        """The `listener` is told how far the start is; the `hub` is the engine core's, for beats, steps and outputs."""
        self.place, self.config, self.hub = place, config, hub
        self.heartbeat = Heartbeat(place.rank, hub)
        self.reporter = StartupReporter(place.rank, listener)
