"""Eagleray and vLLM offline on the same GPUs, one after the other: start, decode at several batch sizes, prefill, mix.

All greedy. Decode is milliseconds per token from requests of 128 tokens that ask for 1 and for 257 more; prefill is 16
prompts of 4,096; mixed is 768 requests of log-normal lengths, all at once; "as people ask" is the same with the options
of a third each: greedy, top-p, top-k with top-p, min-p and penalties; and one in ten with log-probabilities.

Usage: python tests/bench/beside_vllm.py MODEL_DIR [--tp N] [--vllm-path DIR] [--only ENGINE]
"""

import argparse
import sys
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.both_engines import KINDS, Engine, run

BATCHES = (1, 8, 32, 64, 128, 256)
PROMPT, OUTPUT = 128, 256
PREFILL = (16, 4096)
NUM_MIXED = 768
GREEDY: dict[str, Any] = {"temperature": 0.0}


def measure(engine: Engine, _: argparse.Namespace) -> None:
    """Every case of one engine."""
    engine.seconds([64] * 8, [16] * 8, [GREEDY] * 8)
    for batch in BATCHES:
        engine.say(f"decode {batch}", ms_per_token=engine.ms_per_token([GREEDY] * batch, PROMPT, OUTPUT))
    count, length = PREFILL
    prefill = min(engine.seconds([length] * count, [1] * count, [GREEDY] * count) for _ in range(2))
    engine.say("prefill", tokens_per_s=round(count * length / prefill))
    lengths = Random(1)
    num_in = [min(2048, max(16, int(lengths.lognormvariate(5.5, 0.9)))) for _ in range(NUM_MIXED)]
    num_out = [min(1024, max(16, int(lengths.lognormvariate(5.2, 0.8)))) for _ in range(NUM_MIXED)]
    asked = [KINDS[i % len(KINDS)] | ({"logprobs": 5} if i % 10 == 0 else {}) for i in range(NUM_MIXED)]
    engine.seconds([64] * 64, [16] * 64, asked[:64])  # what is compiled on first use
    for case, options in {"mixed": [GREEDY] * NUM_MIXED, "as people ask": asked}.items():
        engine.say(case, tokens_per_s=round(sum(num_out) / engine.seconds(num_in, num_out, options)))


if __name__ == "__main__":
    run(__doc__, measure)
