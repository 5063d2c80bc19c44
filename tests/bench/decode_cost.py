"""What one decode step costs, for 1 to 512 requests with contexts of 128 to 32,768 tokens, beside what memory allows.

One rank, random weights and a KV cache of random numbers. Steps are launched one ahead, as the engine does. The floor
is the time to read all weights but the embedding, and the KV cache of every request, once.

Usage: python tests/bench/decode_cost.py MODEL_DIR [--out FILE.jsonl] [--seconds LIMIT]
       python tests/bench/decode_cost.py --plot FILE.jsonl FILE.png     (anywhere; needs matplotlib)
"""

import argparse
import json
import time
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from eagleray.models.attention import attention_layers
from eagleray.models.decoder import CausalLM
from eagleray.models.loading.loader import load_model
from eagleray.parallel.group import TPGroup
from eagleray.workers.attention.kv_cache import block_bytes
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import RowStart, Sampling, Step
from eagleray.workers.worker import Worker

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (128, 512, 2048, 8192, 32768)
BLOCK_SIZE, STEPS, WARM = 128, 30, 5
KV_BYTES = 90 << 30
BYTES_PER_SECOND = 4.3e12  # of a device copy on an H200
DTYPE = torch.bfloat16


class Steps:
    """Decode steps of one worker, whose requests start with their context in the KV cache."""

    def __init__(self, model_dir: str) -> None:
        device = torch.device("cuda", 0)
        self.model: CausalLM = load_model(model_dir, tp=TPGroup(), dtype=DTYPE, device=device, load_format="dummy")
        specs = [layer.spec for layer in attention_layers(self.model)]
        self.token_bytes = block_bytes(specs, 1, DTYPE)
        self.num_blocks = KV_BYTES // block_bytes(specs, BLOCK_SIZE, DTYPE)
        config = WorkerConfig(
            model=model_dir, device="cuda", dtype="bfloat16", load_format="dummy", seed=0,
            max_model_len=CONTEXTS[-1] + 256, block_size=BLOCK_SIZE, max_num_seqs=BATCHES[-1],
            max_num_batched_tokens=1024, gpu_memory_utilization=0.9, kv_cache_bytes=None, compile=False, threads=None,
        )  # fmt: skip
        self._worker = Worker(config, self.model, TPGroup(), self.num_blocks, graph_sizes=BATCHES)
        for cache in self._worker.model_runner.kv_cache.layers:
            cache.kv.normal_()
        self._num_steps = 0
        self._running: list[int] = []

    def _launch(self, **changes: Any) -> Any:
        self._num_steps += 1
        return self._worker.launch(Step(self._num_steps, **changes))

    def start(self, batch: int, context: int) -> None:
        each = -(-(context + STEPS + WARM + 8) // BLOCK_SIZE)
        tokens = array("i", range(context)).tobytes()
        starts = [
            RowStart(row, tokens, context, list(range(row * each, (row + 1) * each)), Sampling(temperature=0.0),
                     num_computed_tokens=context - 1)
            for row in range(batch)
        ]  # fmt: skip
        self._launch(stop=self._running, start=starts).wait()
        self._running = list(range(batch))

    def microseconds(self) -> float:
        """Median of a step, from the moments when outputs arrive."""
        arrivals, ahead = [], self._launch()
        for _ in range(WARM + STEPS):
            following = self._launch()
            ahead.wait()
            arrivals.append(time.perf_counter())
            ahead = following
        ahead.wait()
        gaps = sorted(b - a for a, b in pairwise(arrivals[WARM:]))
        return gaps[len(gaps) // 2] * 1e6


def measure(model_dir: str, out: str | None, limit_s: float) -> None:
    begin, steps = time.monotonic(), Steps(model_dir)
    weights = sum(p.nbytes for p in steps.model.parameters())
    if steps.model.lm_head is not steps.model.model.embed_tokens:
        weights -= sum(p.nbytes for p in steps.model.model.embed_tokens.parameters())
    for context in CONTEXTS:
        for batch in BATCHES:
            if batch * (-(-(context + STEPS + WARM + 8) // BLOCK_SIZE)) > steps.num_blocks:
                continue
            if time.monotonic() - begin > limit_s:
                return
            steps.start(batch, context)
            floor = (weights + batch * context * steps.token_bytes) / BYTES_PER_SECOND * 1e6
            line = {
                "batch": batch,
                "context": context,
                "us": round(steps.microseconds(), 1),
                "floor_us": round(floor, 1),
            }
            print(json.dumps(line), flush=True)
            if out:
                with Path(out).open("a") as file:
                    file.write(json.dumps(line) + "\n")


def plot(figures: str, picture: str) -> None:
    import matplotlib.pyplot as plt  # type: ignore[import-not-found]

    lines = [json.loads(line) for line in Path(figures).read_text().splitlines()]
    _, axes = plt.subplots(figsize=(9, 6))
    for index, context in enumerate(sorted({line["context"] for line in lines})):
        own = [line for line in lines if line["context"] == context]
        batches = [line["batch"] for line in own]
        axes.plot(batches, [line["us"] / 1e3 for line in own], "o-", color=f"C{index}", label=f"context {context:,}")
        axes.plot(batches, [line["floor_us"] / 1e3 for line in own], ":", color=f"C{index}")
    axes.set(xscale="log", yscale="log", xlabel="requests", ylabel="milliseconds per decode step")
    axes.set_title("One decode step (dotted: the time that reading weights and KV cache takes)")
    axes.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(visible=True, which="both", alpha=0.2)
    axes.legend()
    plt.savefig(picture, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out")
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--plot", nargs=2, metavar=("FIGURES", "PICTURE"))
    arguments = parser.parse_args()
    if arguments.plot:
        plot(*arguments.plot)
    elif arguments.model is None or not torch.cuda.is_available():
        print(json.dumps({"skipped": "decode steps are measured on a GPU, with a model directory"}))
    else:
        measure(arguments.model, arguments.out, arguments.seconds)


if __name__ == "__main__":
    main()
