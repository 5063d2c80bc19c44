"""What options of some requests cost all of a batch, offline, in Eagleray and vLLM, one after the other.

Decode is milliseconds per token from requests of 128 tokens that ask for 1 and for 129 more. An option is asked for by
one of the batch, by a third of it, or by all; the others have a temperature.

Usage: python tests/bench/sampled_cost.py MODEL_DIR [--tp N] [--batches 1,16,64] [--vllm-path DIR] [--only ENGINE]
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.both_engines import Engine, run

PROMPT, OUTPUT = 128, 128
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_k 50 + top_p 0.95": {"top_k": 50, "top_p": 0.95},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.1": {"min_p": 0.1},
    "penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2},
    "logit_bias": {"logit_bias": {1000: 1.0, 2000: -1.0}},
    "logprobs 5": {"logprobs": 5},
}
PLAIN = ("greedy", "temperature")


def measure(engine: Engine, arguments: argparse.Namespace) -> None:
    """Every case of one engine, at every batch size."""
    for batch in map(int, arguments.batches.split(",")):
        for name, options in OPTIONS.items():
            shares = {"all": 1} if name in PLAIN or batch == 1 else {"one": batch, "a third": 3, "all": 1}
            for share, every in shares.items():
                if share not in arguments.shares.split(","):
                    continue
                asked = [{"temperature": 1.0} | (options if place % every == 0 else {}) for place in range(batch)]
                engine.seconds([PROMPT] * batch, [16] * batch, asked)  # what is compiled, or captured, on first use
                engine.say(f"{batch}, {share}, {name}", ms_per_token=engine.ms_per_token(asked, PROMPT, OUTPUT))


if __name__ == "__main__":
    run(
        __doc__,
        measure,
        {
            "--batches": {"default": "1,16,64,128,256", "help": "numbers of requests"},
            "--shares": {"default": "one,a third,all", "help": "how many of them ask for the option"},
        },
    )
