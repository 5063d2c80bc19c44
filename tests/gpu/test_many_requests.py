"""Two thousand requests of all kinds, on so small a KV cache that some are preempted: all end, and nothing is left."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eagleray import AsyncLLM, SamplingParams
from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.kv_cache import block_bytes
from eagleray.workers.protocol.config import WorkerConfig
from support.gpu import needs_gpus
from support.mixed_requests import MixedRequest, mixed_requests
from support.rank_pool import RunRanks
from support.worker_config import worker_config

pytestmark = [pytest.mark.engine, needs_gpus(1), pytest.mark.timeout(600)]

DEVICE = "cuda"
COUNT = 2000
NUM_BLOCKS, BLOCK_SIZE = 200, 16
LARGEST = max((size for size in (2, 4) if size <= torch.cuda.device_count()), default=1)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
ROWS = {"max_num_seqs": 64, "max_num_batched_tokens": 512}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def bytes_of(num_blocks: int, size: int) -> int:
    """Of the KV cache of each of `size` ranks."""
    specs = [AttentionSpec(num_heads=4 // size, num_kv_heads=4 // size, head_size=64, scale=1.0)] * 2
    return num_blocks * block_bytes(specs, BLOCK_SIZE, torch.bfloat16)


async def consume(llm: AsyncLLM, index: int, request: MixedRequest) -> str | None:
    """Take a request's outputs, and abort it if that is its fate; how it ended."""
    sampling = {name: value for name, value in request.sampling.items() if name != "bad_words"}  # texts, not ids
    params = SamplingParams(max_tokens=request.max_tokens, ignore_eos=True, detokenize=False, **sampling)
    name, reason = str(index), None
    async for output in llm.generate(request.prompt, params, name, priority=request.priority):
        completion = output.outputs[0]
        reason = completion.finish_reason
        assert completion.error is None, completion.error
        if reason is None and request.abort_after is not None and len(completion.token_ids) >= request.abort_after:
            await llm.abort(name)
        if reason == "length":
            assert len(completion.token_ids) == request.max_tokens
    return reason


async def serve_all(engine: AsyncLLM) -> list[str | None]:
    """Submit all requests at once; how each ended."""
    async with engine as llm:
        requests = mixed_requests(COUNT, CONFIG["vocab_size"])
        reasons = await asyncio.gather(*(consume(llm, index, request) for index, request in enumerate(requests)))
        async with asyncio.timeout(30):  # the engine may still have the last aborts before it
            while llm.stats.num_running or llm.stats.num_waiting or llm.stats.num_used_blocks:
                await asyncio.sleep(0.01)
        assert llm.stats.num_blocks == NUM_BLOCKS
        assert llm.stats.num_preemptions > 0
    return reasons


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("size", sorted({1, LARGEST}))
def test_all_end_and_nothing_is_left(model_dir: Path, size: int) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "device": DEVICE, "load_format": "dummy", "block_size": BLOCK_SIZE}
    options |= {"kv_cache_bytes": bytes_of(NUM_BLOCKS, size), **ROWS}
    reasons = asyncio.run(serve_all(AsyncLLM(model_dir, size, skip_tokenizer_init=True, **options)))
    assert set(reasons) == {"length", "stop", "abort"}
    assert reasons.count("abort") > COUNT // 10


def config_of(model_dir: Path) -> WorkerConfig:
    return worker_config(
        max_model_len=1024, block_size=BLOCK_SIZE, model=str(model_dir), device=DEVICE, dtype="bfloat16", **ROWS
    )


@pytest.mark.parametrize("size", [pytest.param(size, marks=needs_gpus(size)) for size in (1, 2, 4)])
def test_all_ranks_have_the_same_outputs(model_dir: Path, size: int, run_gpu_ranks: RunRanks) -> None:
    """A scheduler beside rank 0 sends every rank the same steps; each has its own tokens and log-probabilities."""
    first, *others = run_gpu_ranks(
        "many_requests", size, config=config_of(model_dir), num_blocks=NUM_BLOCKS, count=COUNT
    )
    assert all(other["digest"] == first["digest"] for other in others)
    assert first["left"] == (0, 0, 0, 0)
    assert first["num_preemptions"] > 0
    assert set(first["reasons"]) == {"length", "stop", "abort"}
    assert first["num_tokens"] > 10 * COUNT
