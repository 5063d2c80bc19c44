"""Computes how many KV blocks fit on this rank."""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import torch

from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import HAS_TRITON, Accelerator, platform_of
from eagleray.workers.attention.kv_cache import block_bytes
from eagleray.workers.graphs.decode import batch_sizes
from eagleray.workers.graphs.mixed import token_counts
from eagleray.workers.out_of_memory import GIB, describe_use, explained, release_unused
from eagleray.workers.protocol.config import HOST_KV_CACHE_BYTES, WorkerConfig
from eagleray.workers.protocol.messages import RowStart, Sampling, Step
from eagleray.workers.worker import Worker

if HAS_TRITON:
    from eagleray.workers.graphs.compile_ahead import compile_ahead


def num_blocks_that_fit(config: WorkerConfig, model: CausalLM, tp: TPGroup) -> int:
    """Blocks in the configured bytes, else in what weights, steps and decode graphs leave of this GPU's share.

    Raises `MemoryError` when that is nothing.
    """
    specs = [layer.spec for layer in model.attentions]
    each = block_bytes(specs, config.block_size, model.dtype)
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes // each
    accelerator = platform_of(model.device).accelerator
    if accelerator is None:
        return HOST_KV_CACHE_BYTES // each
    need = _measure(config, model, tp, accelerator, num_profile_blocks(config) * each)
    if need.left < each:
        raise MemoryError(_no_room(config, need, model.device))
    return need.left // each


def num_profile_blocks(config: WorkerConfig) -> int:
    """KV blocks that the largest step takes."""
    return config.max_num_seqs * -(-_tokens_of_each(config) // config.block_size)


def _tokens_of_each(config: WorkerConfig) -> int:
    return max(1, min(config.max_num_batched_tokens // config.max_num_seqs, config.max_model_len))


@dataclass(frozen=True)
class _Need:
    """Bytes of one GPU."""

    step: int  # the largest one, without its KV blocks
    graphs: int
    left: int  # for KV blocks


def _measure(config: WorkerConfig, model: CausalLM, tp: TPGroup, accelerator: Accelerator, kv_bytes: int) -> _Need:
    """Capture three decode graphs and run the largest step, on a KV cache of `kv_bytes` that is gone afterwards.

    The graphs' results count in both figures, which leaves a margin.
    """
    sizes, device = batch_sizes(config.max_num_seqs), model.device
    remedy = "lower max_num_batched_tokens or max_num_seqs, use more ranks, or end what else runs on this GPU"
    with explained(f"a step of {config.max_num_batched_tokens} tokens", remedy, device):
        accelerator.reset_peak_memory_stats(device)
        before = accelerator.memory_allocated(device)
        probed, mixed = run_largest_step(config, model, tp, probe_sizes(sizes))
        num_others = max(0, len(token_counts(config.max_num_batched_tokens)) - 1)  # which find room in the largest's
        graphs = (graph_bytes(sizes, probed) if probed else 0) + mixed + num_others * probed.get(sizes[0], 0)
        accelerator.synchronize(device)
        step = max(0, accelerator.max_memory_allocated(device) - before - kv_bytes)
        release_unused(device)
    free, total = accelerator.mem_get_info(device)
    return _Need(step, graphs, int(free - step - graphs - (1 - config.gpu_memory_utilization) * total))


def probe_sizes(sizes: Sequence[int]) -> list[int]:
    """The two largest and the smallest: enough to tell what the others take."""
    return sorted({sizes[0], *sizes[-2:]})


def graph_bytes(sizes: Sequence[int], probed: Mapping[int, int]) -> int:
    """What graphs of all `sizes` take, given what those of `probe_sizes` took.

    The largest is captured first and makes room for the work of all. What another adds, its results and its list of
    launches, grows evenly from the smallest to the second largest.
    """
    first, *others = sorted(sizes, reverse=True)
    if not others:
        return probed[first]
    high, low = others[0], others[-1]
    slope = (probed[high] - probed[low]) / (high - low) if high > low else 0.0
    return probed[first] + sum(round(probed[low] + slope * (size - low)) for size in others)


def _no_room(config: WorkerConfig, need: _Need, device: torch.device) -> str:
    return (
        f"{device} has no memory left for the KV cache: a step of {config.max_num_batched_tokens} tokens needs "
        f"{need.step / GIB:.1f} GiB and the decode graphs {need.graphs / GIB:.1f}; {describe_use(device)}, and "
        f"gpu_memory_utilization {config.gpu_memory_utilization:g} leaves "
        f"{1 - config.gpu_memory_utilization:.0%} unused; raise it, lower max_num_batched_tokens or max_num_seqs, use "
        "more ranks, or end what else runs on this GPU"
    )


def run_largest_step(
    config: WorkerConfig, model: CausalLM, tp: TPGroup, graph_sizes: Sequence[int] | None = None
) -> tuple[dict[int, int], int]:
    """One step with every row in use and the token budget spent, on a KV cache just large enough for it.

    Returns what the decode graphs of `graph_sizes`, and the largest graph of mixed steps, took.
    """
    rows = config.max_num_seqs
    length = _tokens_of_each(config)
    blocks_each = -(-length // config.block_size)
    sampling = Sampling(  # of almost every kind, so that few kernels are left to be compiled while others wait
        temperature=1.0,
        top_p=0.9,
        min_p=1e-6,
        top_n_sigma=100.0,
        repetition_penalty=1.1,
        logit_bias={0: 1.0},
        bad_words=[[0]],
        min_tokens=1,
        stop_token_ids=[0],
        logprobs=1,
    )
    starts = [
        RowStart(
            row,
            array("i", [0] * length).tobytes(),
            length,
            list(range(row * blocks_each, (row + 1) * blocks_each)),
            sampling,
        )
        for row in range(rows)
    ]
    worker = Worker(config, model, tp, num_profile_blocks(config), graph_sizes=graph_sizes)
    step = Step(1, start=starts, chunks=dict.fromkeys(range(rows), length))
    if platform_of(model.device).compiles_kernels:
        compile_ahead([partial(worker.launch, step)], model.device)  # or each kernel would wait for the one before
        step = msgspec.structs.replace(step, step=2, stop=list(range(rows)))
    worker.run(step)
    return worker.graphs.decode_bytes, worker.graphs.mixed_bytes
