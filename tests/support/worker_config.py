"""What a rank is told in tests that build it by hand."""

from typing import Any

from eagleray.workers.protocol.config import WorkerConfig


def worker_config(
    *, max_model_len: int, block_size: int, max_num_seqs: int, max_num_batched_tokens: int, **others: Any
) -> WorkerConfig:
    """A rank whose model and number of blocks are given beside this; on CPU in float64, if `others` do not differ."""
    usual: dict[str, Any] = {
        "model": "",
        "device": "cpu",
        "dtype": "float64",
        "load_format": "dummy",
        "seed": 0,
        "gpu_memory_utilization": 0.9,
        "kv_cache_bytes": None,
        "compile": False,
        "threads": None,
    }
    return WorkerConfig(
        max_model_len=max_model_len,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        **(usual | others),
    )
