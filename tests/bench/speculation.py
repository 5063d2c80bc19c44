"""What drafts by prompt lookup gain on texts that repeat themselves, and cost on those that do not.

Three kinds of requests: code that is to be edited, a text that is to be quoted, and free writing; each kind alone and
in a batch of 8, greedy, with and without drafts, in turn. Prints one JSON object per kind and batch: the ratio of the
times, the share of drafted tokens that were accepted, how many tokens a request got for each of its steps, and whether
all tokens were the same.

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--num-speculative-tokens", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    options: dict[str, Any] = {"enable_prefix_caching": False, "max_model_len": 2048, "seed": 1}
    if not os.path.exists("/dev/nvidia0"):
        options |= {"threads_per_rank": 1, "kv_cache_bytes": 400_000_000}
    most = settings.num_speculative_tokens
    with (
        LLM(settings.model, settings.tp, cpus_per_rank=0.1, **options) as plain,
        LLM(settings.model, settings.tp, cpus_per_rank=0.1, num_speculative_tokens=most, **options) as drafting,
    ):
        for kind in KINDS:
            for batch in (1, 8):
                print(json.dumps({"kind": kind, "batch": batch} | compare(plain, drafting, kind, batch, settings)))


def compare(plain: LLM, drafting: LLM, kind: str, batch: int, settings: argparse.Namespace) -> dict[str, Any]:
    """The best of several rounds on each side, in turn."""
    messages: Any = [
        [{"role": "user", "content": f"{KINDS[kind]}\n{'' if batch == 1 else f'This is request {number}.'}"}]
        for number in range(batch)
    ]
    params = SamplingParams(temperature=0, max_tokens=settings.max_tokens, ignore_eos=True)
    seconds: dict[str, list[float]] = {"plain": [], "drafting": []}
    tokens = {}
    before = drafting.stats
    for _ in range(settings.rounds):
        for name, llm in (("plain", plain), ("drafting", drafting)):
            begin = time.perf_counter()
            outputs = llm.chat(messages, params, use_tqdm=False)
            seconds[name].append(time.perf_counter() - begin)
            tokens[name] = [output.outputs[0].token_ids for output in outputs]
    drafted = drafting.stats.num_draft_tokens - before.num_draft_tokens
    accepted = drafting.stats.num_accepted_tokens - before.num_accepted_tokens
    total = settings.rounds * batch * settings.max_tokens
    return {
        "time_ratio": round(min(seconds["drafting"]) / min(seconds["plain"]), 3),
        "plain_tokens_per_s": round(batch * settings.max_tokens / min(seconds["plain"]), 1),
        "accepted": round(accepted / drafted, 3) if drafted else None,
        "tokens_per_step": round(total / (total - accepted), 2),
        "equal": tokens["plain"] == tokens["drafting"],
    }


if __name__ == "__main__":
    main()
