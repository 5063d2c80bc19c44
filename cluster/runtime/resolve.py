"""Resolves a user's configuration for the ranks: decides every `auto`, checks every limit against the model."""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineStartError
from eagleray.cluster.runtime.ray_address import cluster_address
from eagleray.models.config import ModelConfig, check_tp
from eagleray.models.loading.model_dir import DEMO, is_of_hub, model_dir
from eagleray.models.loading.weight_formats import find_format
from eagleray.parallel.device_kind import DeviceKind, kind_of
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.startup import RankHost


def found(config: EngineConfig) -> EngineConfig:
    """The same with a model that is on this node: a directory's full path, or the commit of a model of the hub.

    So all processes of an engine take the same files, each from its own node. Weights are fetched here only if the
    ranks will be here, too, where no cluster is to be joined; otherwise their nodes fetch them. Raises as `model_dir`.
    """
    weights = config.load_format != "dummy" and cluster_address() is None
    folder = model_dir(config.model, config.revision, weights)
    if is_of_hub(config.model):
        return replace(config, revision=folder.name)
    return config if config.model == DEMO else replace(config, model=str(folder.resolve()))


def folder_of(config: EngineConfig) -> Path:
    """The directory of the model on this node, without its weights if they have not been needed yet."""
    return model_dir(config.model, config.revision)


def check_model(config: EngineConfig) -> ModelConfig:
    """Read the model's configuration and refuse, with `ValueError` and before anything starts, what cannot run."""
    model = ModelConfig.from_dir(folder_of(config))
    check_tp(model, config.tensor_parallel_size)
    if config.load_format == "safetensors":
        find_format(folder_of(config))  # that there are none at all, the ranks' machines say, which may have them
    limit = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > limit:
        raise ValueError(
            f"max_model_len is {config.max_model_len}, but the model was made for {limit} positions; lower it"
        )
    return model


def worker_config(config: EngineConfig, model: ModelConfig, device: str) -> WorkerConfig:
    """What every rank is told. `device` is the name of a kind of device."""
    kind = kind_of(device)
    block_size = config.block_size or kind.block_size
    if kind.wants_powers_of_two and (block_size < 16 or block_size & (block_size - 1)):
        raise ValueError(
            f"block_size is {block_size}; on {kind.name.upper()} give a power of two of at least 16, such as "
            f"{kind.block_size}"
        )
    cores_each = max(1, (os.cpu_count() or 1) // config.tensor_parallel_size)
    return WorkerConfig(
        model=config.model,
        revision=config.revision,
        device=device,
        dtype=_dtype(config, model, kind),
        load_format=config.load_format,
        seed=config.seed or 0,
        max_model_len=config.max_model_len or model.max_position_embeddings,
        block_size=block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        gpu_memory_utilization=config.gpu_memory_utilization,
        kv_cache_bytes=config.kv_cache_bytes,
        compile=config.compile,
        threads=config.threads_per_rank or (cores_each if kind.on_host else None),
    )


def _dtype(config: EngineConfig, model: ModelConfig, kind: DeviceKind) -> str:
    if config.dtype != "auto":
        return config.dtype
    return kind.auto_dtype or model.dtype


def check_memory(hosts: Sequence[RankHost], worker: WorkerConfig) -> None:
    """Raise `EngineStartError` unless the shares of the ranks fit their GPUs, or their nodes."""
    on_host = kind_of(worker.device).on_host
    if on_host:
        needed: dict[str, int] = defaultdict(int)
        for host in hosts:
            needed[host.node_id] += host.needed_bytes
        wholes = [(f"node {host.ip}", needed[host.node_id], host.memory_bytes) for host in hosts]
    else:
        share = worker.gpu_memory_utilization
        wholes = [
            (f"rank {rank}'s GPU", host.needed_bytes, int(host.memory_bytes * share)) for rank, host in enumerate(hosts)
        ]
    for where, need, have in wholes:
        if need > have:
            more = "lower kv_cache_bytes, use more nodes" if on_host else "raise tensor_parallel_size"
            raise EngineStartError(
                f"the model's weights{' and KV cache' * on_host} in {worker.dtype} need "
                f"{need / 1e9:.1f} GB of {where}, which has {have / 1e9:.1f} GB; {more} or a smaller model"
            )


def check_capacity(num_blocks: int, worker: WorkerConfig) -> None:
    """Raise `EngineStartError` unless the KV cache holds one request of the greatest length."""
    capacity = num_blocks * worker.block_size
    if capacity < worker.max_model_len:
        raise EngineStartError(
            f"the KV cache holds {capacity} tokens ({num_blocks} blocks of {worker.block_size}), less than "
            f"max_model_len {worker.max_model_len}; lower max_model_len, raise kv_cache_bytes or "
            "gpu_memory_utilization, or use more ranks"
        )
