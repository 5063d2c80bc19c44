"""The engine core as a Ray actor."""

import os

import ray
from ray.util.placement_group import PlacementGroup

from eagleray.cluster.config import MIXED_STEP_TOKENS, EngineConfig
from eagleray.cluster.core.engine_core import EngineCore
from eagleray.cluster.core.request_check import EngineLimits
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.runtime.engine_info import EngineInfo
from eagleray.cluster.runtime.ray_executor import RayExecutor
from eagleray.cluster.runtime.resolve import check_model, worker_config
from eagleray.workers.protocol.channel import Endpoint, Hub
from eagleray.workers.protocol.garbage import freeze_startup
from eagleray.workers.protocol.priority import run_at_normal_priority


class CoreActor:
    """`start` brings the ranks up, `run` serves until shutdown or failure. The ranks end with this actor."""

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def start(
        self,
        config: EngineConfig,
        device: str,
        group: PlacementGroup,
        front_end_node: str,
        listener: Endpoint,
    ) -> EngineInfo:
        """Start the ranks, which tell the `listener` how far they are. Raises `EngineStartError` with the cause."""
        run_at_normal_priority()
        model = check_model(config)
        worker = worker_config(config, model, device)
        executor = RayExecutor(worker, group, timeout_s=config.start_timeout_s, listener=listener)
        num_blocks = executor.start(group.bundle_count)
        ranks = executor.ranks
        same_node = ray.get_runtime_context().get_node_id() == front_end_node
        front_ends = Hub(None if same_node else ray.util.get_node_ip_address())
        self._core = EngineCore(
            _scheduler(config, worker.block_size, num_blocks),
            executor,
            front_ends,
            EngineLimits(vocab_size=model.vocab_size, max_model_len=worker.max_model_len),
            steps_in_flight=config.steps_in_flight,
            step_timeout_s=config.step_timeout_s,
        )
        return EngineInfo(
            endpoint=front_ends.endpoint,
            max_model_len=worker.max_model_len,
            vocab_size=model.vocab_size,
            block_size=worker.block_size,
            num_blocks=num_blocks,
            device=device,
            dtype=worker.dtype,
            node_id=ray.get_runtime_context().get_node_id(),
            core_pid=os.getpid(),
            rank_pids=[host.pid for host in ranks.hosts],
            niceness=max(host.niceness for host in ranks.hosts),
            start=ranks.start_report,
            seconds_prepared=ranks.seconds_prepared,
        )

    def run(self) -> None:
        """Serve until the owner shuts the engine down. Raises `EngineDeadError` if a rank fails."""
        freeze_startup()
        self._core.run()


def _scheduler(config: EngineConfig, block_size: int, num_blocks: int) -> Scheduler:
    return Scheduler(
        num_blocks=num_blocks,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        mixed_step_tokens=config.mixed_step_tokens or MIXED_STEP_TOKENS,
        max_chunk_tokens=config.max_chunk_tokens,
        enable_prefix_caching=config.enable_prefix_caching,
        num_speculative_tokens=config.num_speculative_tokens,
    )
