"""From what the user set to what the ranks are told: every `auto` decided, every limit checked against the model."""

import os
from pathlib import Path

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineStartError
from eagleray.models.config import ModelConfig, check_tp
from eagleray.models.weight_formats import find_format
from eagleray.workers.config import WorkerConfig

CPU_BLOCK_SIZE = 16
CUDA_BLOCK_SIZE = 128  # FlashAttention-3 reads pages of this size fastest


def check_model(config: EngineConfig) -> ModelConfig:
    """Read the model's configuration and refuse, with `ValueError` and before anything starts, what cannot run."""
    model = ModelConfig.from_dir(config.model)
    check_tp(model, config.tensor_parallel_size)
    if config.load_format == "safetensors":
        find_format(Path(config.model))  # that there are none at all, the ranks' machines say, which may have them
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model was made for {limit} positions; lower it"
        )
    return model


def worker_config(config: EngineConfig, model: ModelConfig, device: str) -> WorkerConfig:
    """What every rank is told. `device` is cpu or cuda."""
    cpu = device == "cpu"
    block_size = config.block_size or (CPU_BLOCK_SIZE if cpu else CUDA_BLOCK_SIZE)
    if not cpu and (block_size < 16 or block_size & (block_size - 1)):
        raise ValueError(f"block_size is {block_size}; on CUDA give a power of two of at least 16, such as 128")
    cores_each = max(1, (os.cpu_count() or 1) // config.tensor_parallel_size)
    return WorkerConfig(
        model=config.model,
        device=device,
        dtype=_dtype(config, model, cpu),
        load_format=config.load_format,
        seed=config.seed,
        max_model_len=config.max_model_len or model.max_position_embeddings,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_bytes=config.kv_cache_bytes,
        compile=config.compile,
        threads=config.threads_per_rank or (cores_each if cpu else None),
    )


def _dtype(config: EngineConfig, model: ModelConfig, cpu: bool) -> str:
    if config.dtype != "auto":
        return config.dtype
    return "float32" if cpu else model.dtype


def check_capacity(num_blocks: int, worker: WorkerConfig) -> None:
    """Raise `EngineStartError` unless the KV cache holds one request of the greatest length."""
    capacity = num_blocks * worker.block_size
    if capacity < worker.max_model_len:
        raise EngineStartError(
            f"the KV cache holds {capacity} tokens ({num_blocks} blocks of {worker.block_size}), less than "
            f"max_model_len {worker.max_model_len}; lower max_model_len, raise kv_cache_bytes or "
            "gpu_memory_utilization, or use more ranks"
        )
