"""What the products of a layer take on one GPU, by the number of tokens of a step.

For the shape of a model (a directory with config.json), random weights in bfloat16. Prints one JSON object per number
of tokens: microseconds of a layer's four products in turn, as a CUDA graph of several layers runs them, and of each
alone; what they compute and read a second; and microseconds per token, which say what sizes a step had better have.

Usage: python tests/bench/products.py MODEL_DIR [--tokens 1,2,4,1024:1300:32]
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

LAYERS = 4  # together larger than the L2 cache
REPLAYS, ROUNDS = 10, 5
TOKENS = "1,2,4,8,16,32,64,128,256,512,1024,2048,4096,8192"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tokens", default=TOKENS, help="numbers, or first:end:step, between commas")
    arguments = parser.parse_args()
    if arguments.model is None or not torch.cuda.is_available():
        print(json.dumps({"skipped": "name a model directory, on a machine with a GPU"}))
        return
    torch.set_default_device("cuda")
    torch.set_default_dtype(torch.bfloat16)
    with torch.inference_mode():
        layers = [Products(json.loads((Path(arguments.model) / "config.json").read_text())) for _ in range(LAYERS)]
        for part in arguments.tokens.split(","):
            for num_tokens in range(*map(int, part.split(":"))) if ":" in part else [int(part)]:
                print(json.dumps(measured(layers, num_tokens)), flush=True)


class Products:
    """The weights of one layer."""

    def __init__(self, config: dict[str, int]) -> None:
        from eagleray.models.kernels import silu_mul
        from eagleray.parallel.weight import DenseWeight
        from eagleray.parallel.weight_shard import Dim

        hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
        size = config.get("head_dim") or hidden // heads

        def weight(outputs: int, inputs: int) -> DenseWeight:
            made = DenseWeight({None: Dim.whole(outputs)}, Dim.whole(inputs))
            made.matrix.normal_(std=inputs**-0.5)
            return made

        self.qkv = weight((heads + 2 * config["num_key_value_heads"]) * size, hidden)
        self.out = weight(hidden, heads * size)
        self.gate_up = weight(2 * inner, hidden)
        self.down = weight(hidden, inner)
        self._silu_mul = silu_mul

    def gated(self, x: Tensor) -> Tensor:
        """As `GatedMLP` does it."""
        found = self.gate_up.silu_gated(x)
        return self._silu_mul(self.gate_up.linear(x)) if found is None else found

    def all(self, x: Tensor) -> Tensor:
        """One after the other; attention's output is as wide as its queries."""
        attended = self.qkv.linear(x)[:, : self.out.matrix.shape[1]].contiguous()
        return self.down.linear(self.gated(self.out.linear(attended)))

    @property
    def num_weights(self) -> int:
        return sum(each.matrix.numel() for each in (self.qkv, self.out, self.gate_up, self.down))


def measured(layers: list[Products], num_tokens: int) -> dict[str, float]:
    """The figures of one number of tokens."""
    first = layers[0]
    x, wide, inner = (torch.randn(num_tokens, w.matrix.shape[1]) for w in (first.qkv, first.out, first.down))

    def chained() -> None:
        y = x
        for layer in layers:
            y = layer.all(y)

    us = microseconds(chained)
    rates = {
        "tflop_s": round(2e-6 * first.num_weights * num_tokens / us, 1),
        "tb_s": round(2e-6 * first.num_weights / us, 2),
        "us_per_token": round(us / num_tokens, 3),
    }
    parts: dict[str, Callable[[Products], object]] = {
        "qkv": lambda layer: layer.qkv.linear(x),
        "out": lambda layer: layer.out.linear(wide),
        "gated": lambda layer: layer.gated(x),
        "down": lambda layer: layer.down.linear(inner),
    }
    each = {name: round(microseconds(partial(_for_each, run, layers)), 2) for name, run in parts.items()}
    return {"tokens": num_tokens, "layer_us": round(us, 2)} | rates | each


def _for_each(run: Callable[[Products], object], layers: list[Products]) -> None:
    for layer in layers:
        run(layer)


def microseconds(run: Callable[[], object]) -> float:
    """The least time of a layer, of several rounds of replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    best = float("inf")
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(REPLAYS):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / REPLAYS / LAYERS * 1e3)
    return best


if __name__ == "__main__":
    main()
