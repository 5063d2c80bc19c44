"""Servers of Eagleray and vLLM on the same GPUs, one after the other, asked by the same client: `vllm bench serve`.

Weights are random and the tokenizer has one word for a token, so a directory with config.json suffices. Cases, greedy
unless said otherwise:

    one        one request at a time: 512 tokens in, 128 out
    rate N     N requests a second (Poisson), 1,024 in, 128 out, for 20 s
    burst      768 at once, 512 in, 256 out
    mix N      N requests a second for 20 s as people send them: lengths log-normal, half of the prompts with a common
               beginning of 256 tokens, a third greedy, a third with temperature 0.7 and top-p 0.95, a third with top-k
               20, top-p 0.8, min-p 0.05 and penalties, one in ten of each with log-probabilities

Every case has prompts of its own: those of `vllm bench serve` with one seed begin alike, whatever the case, and would
be found in the prefix cache. Prints one JSON object per case, with the processor time of the processes that took most.

Usage: python tests/bench/serve_beside_vllm.py MODEL_DIR OUT_DIR [--tp N] [--vllm-path DIR] [--only ENGINE] [--cases …]

`--vllm-path` is put in front of Python's path for vLLM and its client, where they are not installed beside Eagleray.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.both_engines import KINDS

ENGINES = {"eagleray": 8101, "vllm": 8102}  # and their ports
CASES = "one,rate 8,rate 24,burst,mix 24"
LIMITS = {
    "--max-model-len": 8192,
    "--max-num-seqs": 512,
    "--max-num-batched-tokens": 8192,
    "--gpu-memory-utilization": 0.85,
}
PATIENCE_S = 400.0  # until a server is ready
SECONDS = 20  # of a case with a rate
WITH_LOGPROBS = 0.1
COMMON, MAX_IN, MAX_OUT = 256, 4096, 1024
FIGURES = ("output_throughput", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "p99_itl_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--vllm-path")
    parser.add_argument("--only", choices=ENGINES)
    parser.add_argument("--cases", default=CASES)
    settings = parser.parse_args()
    if settings.out is None:
        print(json.dumps({"skipped": "name a model directory and one for results to measure both servers on GPUs"}))
        return
    settings.out.mkdir(parents=True, exist_ok=True)
    model = dummy_model(settings.model, settings.out / "model")
    for engine in [settings.only] if settings.only else ENGINES:
        measure(engine, model, settings)


def dummy_model(given: Path, folder: Path) -> Path:
    """A model of random weights with a tokenizer that has a word for every token."""
    folder.mkdir(exist_ok=True)
    config = json.loads((given / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    special = ["<unk>", "<s>", "</s>"]
    words = [*special, *(f"w{number}" for number in range(len(special), config["vocab_size"]))]
    unsplit = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": number, "content": word, **unsplit} for number, word in enumerate(special)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"},
        "truncation": None, "padding": None, "normalizer": None, "post_processor": None, "decoder": None,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


class Bench:
    """A running server and its clients."""

    def __init__(self, engine: str, model: Path, settings: argparse.Namespace) -> None:
        self._engine, self._model, self._out = engine, model, settings.out
        self._vocab = json.loads((model / "config.json").read_text())["vocab_size"]
        theirs = [settings.vllm_path] if settings.vllm_path else []
        self._environment = os.environ | {"PYTHONPATH": os.pathsep.join([*theirs, os.environ.get("PYTHONPATH", "")])}

    def say(self, case: str, **figures: Any) -> None:
        print(json.dumps({"engine": self._engine, "case": case} | figures), flush=True)

    def run(self, case: str, seed: int) -> None:
        """Measure a case."""
        kind, _, rate = case.partition(" ")
        before = cpu_seconds()
        if kind == "mix":
            figures = self._mix(float(rate), seed)
        else:
            lengths = {"one": (512, 128, 12), "rate": (1024, 128, 0), "burst": (512, 256, 768)}[kind]
            num_in, num_out, count = lengths
            flags = ["--dataset-name", "random", "--random-input-len", num_in, "--random-output-len", num_out]
            flags += ["--max-concurrency", 1] if kind == "one" else []
            flags += ["--request-rate", rate] if rate else []
            flags += ["--num-prompts", count or int(float(rate) * SECONDS)]
            result = self._finish(self._client(f"{kind}{rate}", seed, KINDS[0], *flags))
            figures = {name: round(result[name], 2) for name in FIGURES} | {"completed": result["completed"]}
        spent = {name: round(after - before.get(name, 0.0), 1) for name, after in cpu_seconds().items()}
        most = sorted(spent.items(), key=lambda each: -each[1])[:5]
        self.say(case, **figures, cpu_s={name.partition(" ")[2]: seconds for name, seconds in most})

    def _mix(self, rate: float, seed: int) -> dict[str, Any]:
        """Several clients at once, since each sends requests of one kind."""
        clients: list[Client] = []
        for number, kind in enumerate(KINDS):
            for share, logprobs in ((1 - WITH_LOGPROBS, {}), (WITH_LOGPROBS, {"logprobs": 5})):
                name, own = f"mix{number}{len(logprobs)}", rate * share / len(KINDS)
                count = max(1, round(own * SECONDS))
                file = self._out / f"{name}.jsonl"
                file.write_text("".join(self._prompts(count, Random(100 * seed + len(clients)))))
                flags = ["--dataset-name", "custom", "--dataset-path", file, "--custom-output-len", -1]
                flags += ["--skip-chat-template", "--disable-shuffle", "--num-prompts", count, "--request-rate", own]
                clients.append(self._client(name, seed, kind | logprobs, *flags))
        results = [self._finish(client) for client in clients]
        ttft = np.concatenate([each["ttfts"] for each in results]) * 1e3
        gaps = [gap for each in results for gap in each["itls"] if gap]
        tpot, itl = np.array([np.mean(gap) for gap in gaps]) * 1e3, np.concatenate(gaps) * 1e3
        figures = {"median_ttft_ms": np.median(ttft), "p99_ttft_ms": np.percentile(ttft, 99)}
        figures |= {"median_tpot_ms": np.median(tpot), "p99_tpot_ms": np.percentile(tpot, 99)}
        figures |= {"p99_itl_ms": np.percentile(itl, 99)}
        return {name: round(float(value), 2) for name, value in figures.items()} | {
            "completed": sum(each["completed"] for each in results)
        }

    def _prompts(self, count: int, rng: Random) -> list[str]:
        """Lines of a dataset. The common beginning is the same in every case and client."""
        common = [f"w{number}" for number in range(1000, 1000 + COMMON)]
        lines = []
        for _ in range(count):
            num_in = min(MAX_IN, max(16, int(rng.lognormvariate(5.5, 0.9))))
            num_out = min(MAX_OUT, max(16, int(rng.lognormvariate(5.2, 0.8))))
            words = [f"w{rng.randrange(2000, self._vocab)}" for _ in range(num_in)]
            prompt = " ".join([*(common if rng.random() < 0.5 else ()), *words])
            lines.append(json.dumps({"prompt": prompt, "output_tokens": num_out}) + "\n")
        return lines

    def _client(self, name: str, seed: int, options: dict[str, Any], *flags: Any) -> "Client":
        file = self._out / f"{self._engine}-{name}.json"
        command = [
            *[sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", "serve", "--backend", "openai"],
            *["--base-url", f"http://127.0.0.1:{ENGINES[self._engine]}", "--model", "bench"],
            *["--tokenizer", self._model, "--ignore-eos", "--seed", seed, "--extra-body", json.dumps(options)],
            *["--save-result", "--save-detailed", "--result-filename", file],
            *["--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", "50,99", *flags],
        ]
        log = file.with_suffix(".log").open("w")
        return subprocess.Popen([str(word) for word in command], env=self._environment, stdout=log, stderr=log), file

    @staticmethod
    def _finish(client: "Client") -> dict[str, Any]:
        process, file = client
        if process.wait() != 0:
            sys.exit(f"the client failed: {file.with_suffix('.log').read_text()[-2000:]}")
        result: dict[str, Any] = json.loads(file.read_text())
        file.unlink()
        return result


Client = tuple["subprocess.Popen[bytes]", Path]


def measure(engine: str, model: Path, settings: argparse.Namespace) -> None:
    """Start a server, run all cases, end it."""
    bench = Bench(engine, model, settings)
    program = ["-m", "eagleray", "serve"] if engine == "eagleray" else ["-m", "vllm.entrypoints.cli.main", "serve"]
    limits = [str(word) for option in LIMITS.items() for word in option]
    named = ["--served-model-name", "bench", "--load-format", "dummy", "--tensor-parallel-size", str(settings.tp)]
    command = [sys.executable, *program, str(model), "--port", str(ENGINES[engine]), *named, *limits]
    environment = os.environ if engine == "eagleray" else bench._environment
    log = settings.out / f"{engine}.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            bench.say("ready", seconds=round(ready_after(engine, server), 1))
            for seed, case in enumerate(["rate 8", *settings.cases.split(",")]):  # the first is not of any account
                bench.run(case, seed)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(90)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def ready_after(engine: str, server: "subprocess.Popen[bytes]") -> float:
    begin = time.monotonic()
    while time.monotonic() - begin < PATIENCE_S:
        if server.poll() is not None:
            sys.exit(f"{engine} ended with {server.returncode}; see its log")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{ENGINES[engine]}/v1/models", timeout=2):
                return time.monotonic() - begin
        except OSError:
            time.sleep(0.2)
    sys.exit(f"{engine} is not ready after {PATIENCE_S:g} s; see its log")


def cpu_seconds() -> dict[str, float]:
    """Processor time of every process, by its number and name."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        found[f"{folder.name} {name}"] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


if __name__ == "__main__":
    main()
