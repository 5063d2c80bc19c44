"""What drafts by prompt lookup gain on texts that repeat themselves, and cost on those that do not.

Three kinds of requests: code that is to be edited, a text that is to be quoted, and free writing; and code in a batch
whose others write freely. Each at several batch sizes, greedy, first without drafts and then with them. Prints one JSON
object per kind and batch: the ratio of the times, the share of drafted tokens that were accepted, how many tokens a
request got for each of its steps, and whether all tokens were the same.

Usage: python tests/bench/speculation.py [--model DIR] [--tp N] [--num-speculative-tokens N] [--max-tokens N]
"""

import argparse
import json
import os
import time
from typing import Any

from eagleray import LLM, SamplingParams

FUNCTION = """
def average_of_readings(readings, default_value):
    total_of_readings = 0
    number_of_readings = 0
    for reading in readings:
        if reading is not None:
            total_of_readings = total_of_readings + reading
            number_of_readings = number_of_readings + 1
    if number_of_readings == 0:
        return default_value
    return total_of_readings / number_of_readings
"""
NEWS = (
    "The harbour of Tarrow was closed on Monday after a research vessel lost three anchors in the storm. The crew of "
    "the vessel, which studies how rays migrate along the coast, was brought ashore unharmed. The harbour master said "
    "that the anchors lie in eleven metres of water and will be lifted on Thursday, if the wind allows it."
)
KINDS = {
    "code": f"Write this Python function again with type hints, and change nothing else:\n{FUNCTION}",
    "quotes": f"Repeat this text word for word, and then say in one sentence what it is about:\n{NEWS}",
    "free": "Write a story about a lighthouse keeper who collects clocks that run backwards.",
}


BATCHES = (1, 8, 32)
ONE = "one"  # of the batch is code; the others are free writing

Figures = dict[tuple[str, int], dict[str, Any]]  # by kind and batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    plain, drafting = (measure(most, settings) for most in (0, settings.num_speculative_tokens))
    for (kind, batch), ours in drafting.items():
        theirs = plain[kind, batch]
        accepted, drafted = ours["accepted"], ours["drafted"]
        total = settings.rounds * batch * settings.max_tokens
        figures = {
            "time_ratio": round(ours["seconds"] / theirs["seconds"], 3),
            "plain_tokens_per_s": round(batch * settings.max_tokens / theirs["seconds"], 1),
            "accepted": round(accepted / drafted, 3) if drafted else None,
            "tokens_per_step": round(total / (total - accepted), 2),
            "equal": ours["tokens"] == theirs["tokens"],
        }
        print(json.dumps({"kind": kind, "batch": batch} | figures), flush=True)


def measure(num_speculative_tokens: int, settings: argparse.Namespace) -> Figures:
    """Every case of one engine, each at the best of several rounds."""
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": 2048, "seed": 1}
    if not os.path.exists("/dev/nvidia0"):
        options |= {"threads_per_rank": 1, "kv_cache_bytes": 400_000_000}
    options["num_speculative_tokens"] = num_speculative_tokens
    with LLM(settings.model, settings.tp, cpus_per_rank=0.1, **options) as llm:
        return {(kind, batch): run(llm, kind, batch, settings) for kind in (*KINDS, ONE) for batch in BATCHES}


def run(llm: LLM, kind: str, batch: int, settings: argparse.Namespace) -> dict[str, Any]:
    kinds = ["code", *["free"] * (batch - 1)] if kind == ONE else [kind] * batch
    messages: Any = [
        [{"role": "user", "content": f"{KINDS[each]}\n{'' if number == 0 else f'This is request {number}.'}"}]
        for number, each in enumerate(kinds)
    ]
    params = SamplingParams(temperature=0, max_tokens=settings.max_tokens, ignore_eos=True)
    seconds, before = [], llm.stats
    for _ in range(settings.rounds):
        begin = time.perf_counter()
        outputs = llm.chat(messages, params, use_tqdm=False)
        seconds.append(time.perf_counter() - begin)
    return {
        "seconds": min(seconds),
        "tokens": [output.outputs[0].token_ids for output in outputs],
        "drafted": llm.stats.num_draft_tokens - before.num_draft_tokens,
        "accepted": llm.stats.num_accepted_tokens - before.num_accepted_tokens,
    }


if __name__ == "__main__":
    main()
