"""`WorkerConfig`: what a rank is told when it starts. Importing this needs no torch."""

from dataclasses import dataclass

HOST_KV_CACHE_BYTES = 1 << 30  # of each rank on the host, where `kv_cache_bytes` is not given


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """The same for every rank; checked by `EngineConfig`, from which it is made."""

    model: str  # as `model_dir` has it
    revision: str | None = None
    device: str  # the name of a `DeviceKind`
    dtype: str  # float32, bfloat16 or float16
    load_format: str
    seed: int  # of dummy weights
    max_model_len: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu_memory_utilization: float
    kv_cache_bytes: int | None
    compile: bool
    threads: int | None  # of this rank's CPU kernels; None leaves torch's own choice
