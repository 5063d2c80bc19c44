"""What benchmarks share that run Eagleray and vLLM offline on the same GPUs, one after the other.

Weights are random and prompts are token ids, so a directory with config.json suffices. Each engine runs in a process of
its own, which prints one JSON object per figure.
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
LIMITS: dict[str, Any] = {
    "max_model_len": 8192,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 8192,
    "gpu_memory_utilization": 0.85,
}
# what people send, a third of each
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.95},
    {
        "temperature": 0.7,
        "top_k": 20,
        "top_p": 0.8,
        "min_p": 0.05,
        "repetition_penalty": 1.05,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.1,
    },
]


class Engine:
    """One of the two, started. Both know sampling parameters under the same names."""

    def __init__(self, name: str, model: str, tp: int) -> None:
        begin = time.perf_counter()
        options: dict[str, Any] = {"skip_tokenizer_init": True, "load_format": "dummy", "enable_prefix_caching": False}
        if name == "eagleray":
            from eagleray import LLM, SamplingParams

            options["start_timeout_s"] = 600
        else:
            from vllm import LLM, SamplingParams  # type: ignore[import-not-found, no-redef]
        self._llm: Any = LLM(model=model, tensor_parallel_size=tp, **LIMITS, **options)
        self._params: Any = SamplingParams
        self._name, self._tp = name, tp
        self._rng = Random(0)
        self.say("start", seconds=round(time.perf_counter() - begin, 1))

    def say(self, case: str, **figures: Any) -> None:
        """Print the figures of a case."""
        print(json.dumps({"engine": self._name, "tp": self._tp, "case": case, **figures}), flush=True)

    def seconds(self, num_in: Sequence[int], num_out: Sequence[int], options: Sequence[dict[str, Any]]) -> float:
        """What prompts of these lengths, with so many new tokens each and drawn with these `options`, take at once."""
        inputs = [{"prompt_token_ids": [self._rng.randrange(1000, 100_000) for _ in range(n)]} for n in num_in]
        params = [
            self._params(max_tokens=count, ignore_eos=True, detokenize=False, **each)
            for count, each in zip(num_out, options, strict=True)
        ]
        begin = time.perf_counter()
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        taken = time.perf_counter() - begin
        came = [len(output.outputs[0].token_ids) for output in outputs]
        assert came == list(num_out), "an engine that stops early cannot be timed"
        return taken

    def ms_per_token(self, options: Sequence[dict[str, Any]], num_in: int, num_out: int) -> float:
        """Of a decode of as many requests as there are `options`, each with the prompt of `num_in` tokens."""
        batch = len(options)

        def least(length: int) -> float:
            return min(self.seconds([num_in] * batch, [length] * batch, options) for _ in range(2))

        return round((least(1 + num_out) - least(1)) / num_out * 1e3, 3)


def run(
    doc: str | None,
    measure: Callable[[Engine, argparse.Namespace], None],
    more: dict[str, dict[str, Any]] | None = None,
) -> None:
    """The command line of a benchmark that does `measure` with each engine; `more` are options of its own.

    In the end it prints all ratios, ours over theirs: below 1 is better for times, above 1 for rates.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--vllm-path", help="what is put in front of Python's path for vLLM alone")
    parser.add_argument("--only", choices=ENGINES)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    for option, settings in (more or {}).items():
        parser.add_argument(option, **settings)
    arguments = parser.parse_args()
    if arguments.model is None:
        print(json.dumps({"skipped": "name a model directory to measure both engines on GPUs"}))
    elif arguments.here:
        measure(Engine(arguments.only, arguments.model, arguments.tp), arguments)
    else:
        engines = [arguments.only] if arguments.only else ENGINES
        figures = [_run_apart(engine, arguments.vllm_path) for engine in engines]
        if len(figures) == 2:
            ours, theirs = figures
            ratios = {case: round(ours[case] / theirs[case], 3) for case in ours if case in theirs}
            print(json.dumps({"tp": arguments.tp, "ours_over_theirs": ratios}), flush=True)


def _run_apart(engine: str, vllm_path: str | None) -> dict[str, float]:
    """The figures of one engine, by case, from a process of its own."""
    environment = dict(os.environ)
    if engine == "vllm" and vllm_path:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [vllm_path, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, *sys.argv, "--only", engine, "--here"]
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
