"""How many KV blocks this rank has room for."""

from array import array

import torch

from eagleray.models.attention import attention_layers
from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.workers.config import WorkerConfig
from eagleray.workers.kv_cache import block_bytes
from eagleray.workers.wire import RowStart, Sampling, Step
from eagleray.workers.worker import Worker

CPU_KV_CACHE_BYTES = 1 << 30


def num_blocks_that_fit(config: WorkerConfig, model: CausalLM, tp: TPGroup) -> int:
    """Blocks in the configured bytes, else (CUDA) in what a run of the largest step leaves of the GPU's memory."""
    parameter = next(model.parameters())
    specs = [layer.spec for layer in attention_layers(model)]
    each = block_bytes(specs, config.block_size, parameter.dtype)
    if config.kv_cache_bytes is not None:
        return config.kv_cache_bytes // each
    if parameter.device.type == "cpu":
        return CPU_KV_CACHE_BYTES // each
    profiled = num_profile_blocks(config) * each
    return max(0, _free_cuda_bytes(config, model, tp, parameter.device) + profiled) // each


def num_profile_blocks(config: WorkerConfig) -> int:
    """KV blocks that the largest step takes."""
    return config.max_num_seqs * -(-_tokens_of_each(config) // config.block_size)


def _tokens_of_each(config: WorkerConfig) -> int:
    return max(1, min(config.max_num_batched_tokens // config.max_num_seqs, config.max_model_len))


def _free_cuda_bytes(config: WorkerConfig, model: CausalLM, tp: TPGroup, device: torch.device) -> int:
    """What is left of this GPU's share after the weights and a run of the largest step, its KV blocks included."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run_largest_step(config, model, tp)
    torch.cuda.synchronize(device)
    activations = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - activations - (1 - config.gpu_memory_utilization) * total)


def run_largest_step(config: WorkerConfig, model: CausalLM, tp: TPGroup) -> None:
    """One step with every row in use and the token budget spent, on a KV cache just large enough for it."""
    rows = config.max_num_seqs
    length = _tokens_of_each(config)
    blocks_each = -(-length // config.block_size)
    sampling = Sampling(temperature=1.0, top_p=0.9)
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
    worker = Worker(config, model, tp, num_profile_blocks(config), capture=False)
    worker.run(Step(1, start=starts, slices=dict.fromkeys(range(rows), length)))
