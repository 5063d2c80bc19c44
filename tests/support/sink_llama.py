"""A Llama whose heads have sinks: a family that only tests know, since no family of ours has them.

Importing this registers it, so that it loads and runs as any other.
"""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import support.interpreter  # noqa: F401  which makes it faster
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.models.architectures import ARCHITECTURES, Architecture
from eagleray.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import INTERPRETED
from eagleray.workers import model_runner
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import TokenLogprobs
from eagleray.workers.worker import Worker
from support.inline_engine import InlineEngine

NAME = "SinkLlamaForCausalLM"
ARCHITECTURES[NAME] = Architecture(model=f"{__name__}:{NAME}", options=frozenset({"sliding_window"}))


class SinkAttention(LlamaAttention):
    has_sinks = True


class SinkLlamaDecoderLayer(LlamaDecoderLayer):
    attention_class = SinkAttention


class SinkLlamaForCausalLM(LlamaForCausalLM):
    layer_class = SinkLlamaDecoderLayer


@dataclass(frozen=True)
class Run:
    """What a worker made of some prompts."""

    token_ids: list[list[int]]
    captured: tuple[bool, bool]  # whether decodes, and mixed steps, ran as graphs would
    logprobs: dict[int, list[TokenLogprobs]]  # of prompts that ask


def run_worker(
    tp: TPGroup,
    path: str,
    prompts: list[list[int]],
    in_kernels: bool,
    samplings: list[dict[str, Any]] | None = None,
    lines_at_once: int = 64,
) -> Run:
    """Tokens after prompts that run in chunks of seven tokens beside requests that are decoding.

    They are greedy, or drawn by each prompt's own `samplings`, in small tiles, `lines_at_once` by a rank.

    With `in_kernels`, which wants Triton's interpreter, both of our kernels attend, else plain PyTorch.
    """
    if not in_kernels:
        return _run(tp, path, prompts, samplings, graph_sizes=[])
    assert INTERPRETED
    from eagleray.workers.attention.varlen import VarlenBackend  # the interpreter only
    from eagleray.workers.sampling import kernel_sampler, sampler
    from support.redraw import small

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(model_runner, "choose_backend", lambda *layer: VarlenBackend())  # as on GPUs
        small(patches)
        for module in (kernel_sampler, sampler):
            patches.setattr(module, "LINES_AT_ONCE", lines_at_once)
        return _run(tp, path, prompts, samplings, graph_sizes=None)


def _run(
    tp: TPGroup,
    path: str,
    prompts: list[list[int]],
    samplings: list[dict[str, Any]] | None,
    graph_sizes: list[int] | None,
) -> Run:
    limits: dict[str, Any] = {"block_size": 16, "max_num_seqs": 5, "max_num_batched_tokens": 64}
    config = WorkerConfig(
        model=path,
        device="cpu",
        dtype="float32",
        load_format="safetensors",
        seed=0,
        max_model_len=64,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
        compile=False,
        threads=None,
        **limits,
    )
    model = load_model(path, tp=tp, dtype=torch.float32, device=torch.device("cpu"))
    rank = Worker(config, model, tp, 60, graph_sizes=graph_sizes)
    engine = InlineEngine(Scheduler(num_blocks=60, max_chunk_tokens=7, **limits), rank, 2)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, 4 + index % 3, **(samplings[index] if samplings else {"temperature": 0.0}))
    engine.run()
    indices = range(len(prompts))
    logprobs = {index: [each for news in engine.news[index] for each in news.logprobs or []] for index in indices}
    captured = rank.graphs.has_decodes, rank.graphs.has_mixed
    return Run(
        [engine.token_ids(index) for index in indices], captured, {i: each for i, each in logprobs.items() if each}
    )
