"""A rank as a Ray actor: says where it runs, and hands every call to `Rank`."""

import ray

from eagleray.parallel.device_kind import kind_of
from eagleray.workers.protocol.channel import Endpoint
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.startup import Loaded, RankHost
from eagleray.workers.rank import Rank
from eagleray.workers.rank_start import Place


class RankActor:
    """Its methods are those of `Rank`."""

    def __init__(
        self, rank: int, size: int, generation: int, config: WorkerConfig, listener: Endpoint, hub: Endpoint
    ) -> None:
        node_id = ray.get_runtime_context().get_node_id()
        gpu = None if kind_of(config.device).on_host else int(ray.get_gpu_ids()[0])
        place = Place(rank, size, generation, node_id, ray.util.get_node_ip_address(), gpu)
        self._rank = Rank(place, config, listener, hub)

    def prepare(self, one_node: bool) -> RankHost:
        """As `Rank.prepare`."""
        return self._rank.prepare(one_node)

    def load(self, ip: str, store_port: int | None) -> Loaded:
        """As `Rank.load`."""
        return self._rank.load(ip, store_port)

    def serve(self, num_blocks: int) -> None:
        """As `Rank.serve`."""
        self._rank.serve(num_blocks)
