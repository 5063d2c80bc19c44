"""What options of some requests cost all of a batch: milliseconds per step with and without them, offline.

Weights are random and prompts are token ids, so a directory with config.json suffices. Decode is milliseconds per token
from requests of 128 tokens that ask for 1 and for 129 more. Prints one JSON object per case.

Usage: python tests/bench/sampled_cost.py MODEL_DIR [--tp N] [--batches 16,64,128]
"""

import argparse
import json
import time
from random import Random
from typing import Any

PROMPT, OUTPUT = 128, 128
CASES: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether all rows have them, or one
    "greedy": ({"temperature": 0.0}, True),
    "random": ({}, True),
    "one top_p": ({"top_p": 0.9}, False),
    "one logprobs": ({"logprobs": 1}, False),
    "top_k 50": ({"top_k": 50}, True),
    "top_k 50 + top_p 0.95": ({"top_k": 50, "top_p": 0.95}, True),
    "top_p 0.9": ({"top_p": 0.9}, True),
    "min_p 0.1": ({"min_p": 0.1}, True),
    "penalties": ({"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2}, True),
    "logit_bias": ({"logit_bias": {1000: 1.0, 2000: -1.0}}, True),
    "logprobs 5": ({"logprobs": 5}, True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--batches", default="16,64,128")
    arguments = parser.parse_args()
    if arguments.model is None:
        print(json.dumps({"skipped": "name a model directory to measure on GPUs"}))
        return
    from eagleray import LLM, SamplingParams

    llm = LLM(
        arguments.model, arguments.tp, skip_tokenizer_init=True, load_format="dummy", enable_prefix_caching=False,
        max_model_len=2048, max_num_seqs=256, max_num_batched_tokens=8192, gpu_memory_utilization=0.6,
    )  # fmt: skip
    rng = Random(0)

    def seconds(batch: int, length: int, options: dict[str, Any], of_all: bool) -> float:
        prompts = [[rng.randrange(1000, 100_000) for _ in range(PROMPT)] for _ in range(batch)]
        every: dict[str, Any] = {"max_tokens": length, "ignore_eos": True, "detokenize": False}
        params = [
            SamplingParams(**every | {"temperature": 1.0} | (options if of_all or number == 0 else {}))
            for number in range(batch)
        ]
        begin = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - begin
        assert all(len(output.outputs[0].token_ids) == length for output in outputs)
        return taken

    seconds(8, 16, {}, True)
    for batch in map(int, arguments.batches.split(",")):
        for name, (options, of_all) in CASES.items():
            seconds(batch, 4, options, of_all)  # what is compiled on first use
            first = min(seconds(batch, 1, options, of_all) for _ in range(2))
            whole = min(seconds(batch, 1 + OUTPUT, options, of_all) for _ in range(2))
            ms = round((whole - first) / OUTPUT * 1e3, 3)
            print(json.dumps({"tp": arguments.tp, "batch": batch, "case": name, "ms_per_token": ms}), flush=True)
    llm.close()


if __name__ == "__main__":
    main()
