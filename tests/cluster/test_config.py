"""What a user sets when an engine starts."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.runtime.resolve import check_model, worker_config
from eagleray.models.config import ModelConfig


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "tensor_parallel_size": [0, -1, 1.0, True, "2", None, 2**31],
        "dtype": ["float64", None],
        "device": ["tpu"],
        "load_format": ["pickle"],
        "seed": [-1, 1.5, "a", 2**64],
        "max_model_len": [0, 2.5, "8k", 2**31],
        "kv_cache_bytes": [0, -5, 1e9],
        "enable_prefix_caching": ["false", 1, None],
        "compile": ["no", 0],
        "gpu_memory_utilization": [0, 1.5, math.nan, "0.9"],
        "cpus_per_rank": [0, math.inf, "2"],
        "placement_timeout_s": [0, math.inf, math.nan],
        "start_timeout_s": [-1, math.inf],
        "step_timeout_s": ["5", math.inf, None],
        "steps_in_flight": [0, 1.0, 2**40],
        "max_num_seqs": [0, 2**17, 2**62],
        "max_num_batched_tokens": [2**23],
        "mixed_step_tokens": [0, 2**23],
        "max_chunk_tokens": [0, 2**23],
        "block_size": [0, 2**31],
        "threads_per_rank": [0, 2**31],
        "num_speculative_tokens": [-1, 65, None],
    }.items(),
)
def test_a_bad_value_is_refused_by_name_and_value(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{field} is ") as refusal:
            EngineConfig(**{"model": "m", field: value})
        assert repr(value) in str(refusal.value)


def test_blocks_on_cuda_are_of_a_power_of_two(tmp_path: Path) -> None:
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = sizes | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    model = ModelConfig.from_dir(tmp_path)
    for block_size in (8, 48):
        engine = EngineConfig(model=str(tmp_path), block_size=block_size)
        with pytest.raises(ValueError, match=f"block_size is {block_size}; on CUDA give a power of two"):
            worker_config(engine, model, "cuda")
        assert worker_config(engine, model, "cpu").block_size == block_size


@pytest.mark.parametrize(
    ("device", "block_size", "dtype", "has_threads"), [("cpu", 16, "float32", True), ("cuda", 128, "bfloat16", False)]
)
def test_what_is_not_given_suits_the_device(
    device: str, block_size: int, dtype: str, has_threads: bool, tmp_path: Path
) -> None:
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = sizes | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}))
    worker = worker_config(EngineConfig(model=str(tmp_path)), ModelConfig.from_dir(tmp_path), device)
    assert (worker.block_size, worker.dtype, worker.threads is not None) == (block_size, dtype, has_threads)


def test_weights_of_another_format_are_refused_before_anything_starts(tmp_path: Path) -> None:
    sizes = {"vocab_size": 10, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = sizes | {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 1, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"but pytorch_model\.bin; convert it to safetensors: python -c"):
        check_model(EngineConfig(model=str(tmp_path)))
    check_model(EngineConfig(model=str(tmp_path), load_format="dummy"))
    (tmp_path / "model.safetensors").touch()
    check_model(EngineConfig(model=str(tmp_path)))


def test_drafts_need_rows_beside_those_that_run() -> None:
    with pytest.raises(ValueError, match="num_speculative_tokens is 8, but drafts share max_num_seqs, 8"):
        EngineConfig(model="m", max_num_seqs=8, num_speculative_tokens=8)
    EngineConfig(model="m", max_num_seqs=9, num_speculative_tokens=8)


def test_a_step_must_have_room_for_a_token_of_every_request() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens is 100, less than max_num_seqs 200"):
        EngineConfig(model="m", max_num_batched_tokens=100, max_num_seqs=200)
    EngineConfig(model="m", max_num_batched_tokens=200, max_num_seqs=200)


def test_a_chunk_must_fit_into_a_step() -> None:
    with pytest.raises(ValueError, match="max_chunk_tokens is 600, more than max_num_batched_tokens 512"):
        EngineConfig(model="m", max_num_batched_tokens=512, max_chunk_tokens=600)
    EngineConfig(model="m", max_num_batched_tokens=512, max_chunk_tokens=512)
    with pytest.raises(ValueError, match="mixed_step_tokens is 600, more than max_num_batched_tokens 512"):
        EngineConfig(model="m", max_num_batched_tokens=512, mixed_step_tokens=600)
    EngineConfig(model="m", max_num_batched_tokens=512)  # what is not asked for is not refused


def test_a_limit_is_told_to_the_last_digit() -> None:
    with pytest.raises(ValueError, match=r"^max_num_seqs is 65537; give a whole number from 1 to 65536$"):
        EngineConfig(model="m", max_num_seqs=65537)
