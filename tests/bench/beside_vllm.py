"""Eagleray and vLLM offline on the same GPUs, one after the other: start, decode at several batch sizes, prefill, mix.

Weights are random and prompts are token ids, so a directory with config.json suffices. Decode is milliseconds per token
from requests of 128 tokens that ask for 1 and for 257 more; prefill is 16 prompts of 4,096; mixed is 768 requests of
log-normal lengths, all at once. Each engine runs in a process of its own. Prints one JSON object per case, then one
with all ratios (ours over theirs: below 1 is better for times, above 1 for rates).

Usage: python tests/bench/beside_vllm.py MODEL_DIR [--tp N] [--vllm-path DIR] [--only ENGINE]

`--vllm-path` is put in front of Python's path for vLLM alone, where it is not installed beside Eagleray.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

ENGINES = ("eagleray", "vllm")
BATCHES = (1, 8, 32, 64, 128, 256)
PROMPT, OUTPUT = 128, 256
PREFILL = (16, 4096)
NUM_MIXED = 768
LIMITS: dict[str, Any] = {
    "max_model_len": 8192,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.85,
}

# Runs prompts of given lengths for given numbers of new tokens, and returns how many came.
Generate = Callable[[list[list[int]], Sequence[int]], list[int]]


def start_eagleray(model: str, tp: int) -> Generate:
    from eagleray import LLM, SamplingParams

    llm = LLM(
        model, tp, skip_tokenizer_init=True, load_format="dummy", enable_prefix_caching=False, start_timeout_s=600,
        **LIMITS,
    )  # fmt: skip

    def generate(prompts: list[list[int]], lengths: Sequence[int]) -> list[int]:
        params = [
            SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, temperature=0.0) for length in lengths
        ]
        return [len(out.outputs[0].token_ids) for out in llm.generate(prompts, params, use_tqdm=False)]

    return generate


def start_vllm(model: str, tp: int) -> Generate:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        model=model, tensor_parallel_size=tp, skip_tokenizer_init=True, load_format="dummy",
        enable_prefix_caching=False, **LIMITS,
    )  # fmt: skip

    def generate(prompts: list[list[int]], lengths: Sequence[int]) -> list[int]:
        params = [
            SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, temperature=0.0) for length in lengths
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [len(out.outputs[0].token_ids) for out in llm.generate(inputs, params, use_tqdm=False)]

    return generate


def measure(engine: str, model: str, tp: int) -> None:
    """Every case of one engine, as lines of JSON."""

    def say(case: str, **figures: float) -> None:
        print(json.dumps({"engine": engine, "tp": tp, "case": case, **figures}), flush=True)

    begin = time.perf_counter()
    generate = (start_eagleray if engine == "eagleray" else start_vllm)(model, tp)
    say("start", seconds=round(time.perf_counter() - begin, 1))
    rng = Random(0)

    def seconds(num_in: Sequence[int], num_out: Sequence[int]) -> float:
        prompts = [[rng.randrange(1000, 100_000) for _ in range(n)] for n in num_in]
        begin = time.perf_counter()
        came = generate(prompts, num_out)
        taken = time.perf_counter() - begin
        assert came == list(num_out), "an engine that stops early cannot be timed"
        return taken

    seconds([64] * 8, [16] * 8)
    for batch in BATCHES:
        first = min(seconds([PROMPT] * batch, [1] * batch) for _ in range(2))
        whole = min(seconds([PROMPT] * batch, [1 + OUTPUT] * batch) for _ in range(2))
        say(f"decode {batch}", ms_per_token=round((whole - first) / OUTPUT * 1e3, 3))
    count, length = PREFILL
    say("prefill", tokens_per_s=round(count * length / min(seconds([length] * count, [1] * count) for _ in range(2))))
    lengths = Random(1)
    num_in = [min(2048, max(16, int(lengths.lognormvariate(5.5, 0.9)))) for _ in range(NUM_MIXED)]
    num_out = [min(1024, max(16, int(lengths.lognormvariate(5.2, 0.8)))) for _ in range(NUM_MIXED)]
    say("mixed", tokens_per_s=round(sum(num_out) / seconds(num_in, num_out)))


def run_apart(engine: str, model: str, tp: int, vllm_path: str | None) -> dict[str, float]:
    """The figures of one engine, by case, from a process of its own."""
    environment = dict(os.environ)
    if engine == "vllm" and vllm_path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [vllm_path, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, model, "--tp", str(tp), "--only", engine]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    figures = {}
    for line in process.stdout:
        if line.startswith('{"engine"'):
            print(line, end="", flush=True)
            case: dict[str, Any] = json.loads(line)
            figures[case["case"]] = next(v for k, v in case.items() if k not in ("engine", "tp", "case"))
    if process.wait() != 0:
        print(f"{engine} ended with exit code {process.returncode}", file=sys.stderr)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--vllm-path")
    parser.add_argument("--only", choices=ENGINES)
    arguments = parser.parse_args()
    if arguments.model is None:
        print(json.dumps({"skipped": "name a model directory to measure both engines on GPUs"}))
        return
    if arguments.only:
        measure(arguments.only, arguments.model, arguments.tp)
        return
    ours, theirs = (run_apart(e, arguments.model, arguments.tp, arguments.vllm_path) for e in ENGINES)
    ratios = {case: round(ours[case] / theirs[case], 3) for case in ours if case in theirs}
    print(json.dumps({"tp": arguments.tp, "ours_over_theirs": ratios}), flush=True)


if __name__ == "__main__":
    main()
