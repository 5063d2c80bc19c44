"""Checks that a rank's shard fits the memory of its node, before anything of that size is allocated."""

from pathlib import Path

import torch

from eagleray.models.config import ModelConfig
from eagleray.models.loading.loader import build_model
from eagleray.parallel.device_kind import kind_of
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import platform_of
from eagleray.workers.protocol.config import HOST_KV_CACHE_BYTES, WorkerConfig

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


def needed_bytes(folder: Path, config: WorkerConfig, rank: int, size: int) -> int:
    """Bytes of weights, and on the host of the KV cache; steps need little beside them."""
    tp = TPGroup(rank, size)
    model = ModelConfig.from_dir(folder)
    outline = build_model(model, tp=tp, dtype=getattr(torch, config.dtype), device=torch.device("meta"))
    weights = sum(parameter.nbytes for parameter in outline.parameters())
    return weights + (config.kv_cache_bytes or HOST_KV_CACHE_BYTES) * kind_of(config.device).on_host


def memory_bytes(device: torch.device) -> int:
    """All memory of a GPU, or of this node as far as its container may use it."""
    if (accelerator := platform_of(device).accelerator) is not None:
        return accelerator.mem_get_info(device)[1]
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return min([int(total.split()[1]) * 1024, *_limits()])


def _limits() -> list[int]:
    found = []
    for path in CGROUP_LIMITS:
        try:
            found.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return found
