"""The facts about a running engine that a front end is told once."""

import msgspec

from eagleray.cluster.runtime.start_report import StartReport
from eagleray.workers.protocol.channel import Endpoint


class EngineInfo(msgspec.Struct, frozen=True):
    """What a front end is told once the engine is ready."""

    endpoint: Endpoint
    max_model_len: int
    vocab_size: int
    block_size: int
    num_blocks: int
    device: str
    dtype: str
    node_id: str  # where the core runs
    core_pid: int
    rank_pids: list[int]
    niceness: int  # the greatest of all ranks
    start: StartReport
    seconds_prepared: float  # from when all processes had their imports until the ranks were ready
