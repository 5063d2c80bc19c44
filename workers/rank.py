"""One rank of an engine: starts in three calls, then runs the steps that arrive until told to end."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from eagleray.workers.protocol.channel import Endpoint
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.priority import run_at_normal_priority
from eagleray.workers.protocol.startup import Loaded, RankHost
from eagleray.workers.rank_start import Place, RankStart

if TYPE_CHECKING:
    from eagleray.workers.rank_phases import LoadedRank, PreparedRank

# NVLink multicast is not available on every machine, and these libraries hang rather than notice.
CUDA_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "NVSHMEM_DISABLE_NVLS": "1",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
}
# Triton keeps what it has compiled in TRITON_CACHE_DIR, or else in ~/.triton/cache. Nothing here changes or clears it:
# a folder that outlives the rank makes the next start some seconds shorter.


class Rank:
    """Starts in three calls, each made on every rank before the next: `prepare`, `load`, `serve`.

    A call takes the rank to its next phase, an object of its own. torch is imported by `prepare` and not with this
    module: the core imports the module too, and the environment that torch's libraries read must be set before.
    """

    def __init__(self, place: Place, config: WorkerConfig, listener: Endpoint, hub: Endpoint) -> None:
        """As `RankStart`."""
        self._phase: RankStart | PreparedRank | LoadedRank = RankStart(place, config, listener, hub)

    def prepare(self, one_node: bool) -> RankHost:
        """Import all that the rank will need, take its device, and open the store on rank 0.

        Ranks on `one_node` talk over loopback alone.
        """
        start = self._phase
        assert isinstance(start, RankStart), "a rank is prepared once"
        config, folder = start.config, Path(start.config.model)
        if folder.is_absolute() and not folder.is_dir():
            raise ValueError(
                f"there is no model at {config.model} on node {start.place.node_ip}; copy it there, to the same path "
                "on every node, or name a directory that all nodes share"
            )
        niceness = run_at_normal_priority()
        _set_environment(config.threads)
        from eagleray.workers.rank_phases import PreparedRank

        self._phase = PreparedRank(start, one_node=one_node, niceness=niceness)
        return self._phase.host

    def load(self, ip: str, store_port: int | None) -> Loaded:
        """Join the ranks, load this one's shard of the model, and find out how many KV blocks fit."""
        from eagleray.workers.rank_phases import LoadedRank, PreparedRank

        assert isinstance(self._phase, PreparedRank), "a rank is prepared before it is loaded"
        self._phase = LoadedRank(self._phase, ip, store_port)
        return self._phase.report

    def serve(self, num_blocks: int) -> None:
        """Run the steps that arrive until told goodbye. Rank 0 answers each with its output."""
        from eagleray.workers.rank_phases import LoadedRank

        assert isinstance(self._phase, LoadedRank), "a rank is loaded before it serves"
        self._phase.serve(num_blocks)


def _set_environment(threads: int | None) -> None:
    os.environ.update(CUDA_ENVIRONMENT)
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # peer access needs to see the other ranks' GPUs
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
