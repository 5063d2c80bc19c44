"""Requests of all kinds, in thousands: of any length, sampled in every way, of unequal priority, some aborted."""

from dataclasses import dataclass
from random import Random
from typing import Any

from support.inline_engine import InlineEngine

WAYS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.2, "min_p": 0.01, "repetition_penalty": 1.2},
    {"temperature": 0.7, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": 0},
    {"temperature": 1.0, "logit_bias": {3: 5.0}, "stop_token_ids": [3], "min_tokens": 2},
    {"temperature": 1.0, "allowed_token_ids": [5, 6, 7, 900]},
    {"temperature": 1.0, "allowed_token_ids": [5, 6, 7, 900], "bad_words": [[5], [6, 7], [7, 7, 900]]},
    {"temperature": 0.0, "prompt_logprobs": 1},
]


@dataclass(frozen=True)
class MixedRequest:
    prompt: list[int]
    max_tokens: int
    priority: int
    sampling: dict[str, Any]
    abort_after: int | None  # tokens


def mixed_requests(count: int, vocab_size: int) -> list[MixedRequest]:
    """Prompts of 1 to 700 tokens, every third beginning alike; every sixth request is aborted."""
    rng = Random(11)
    common = [rng.randrange(vocab_size) for _ in range(300)]
    requests = []
    for index in range(count):
        length = rng.randrange(1, 700) if index % 20 == 0 else rng.randrange(1, 150)
        prompt = (common if index % 3 == 0 else []) + [rng.randrange(vocab_size) for _ in range(length)]
        requests.append(
            MixedRequest(
                prompt=prompt[:700],
                max_tokens=rng.randrange(2, 60),
                priority=rng.randrange(3),
                sampling=WAYS[index % len(WAYS)] | {"seed": index},
                abort_after=rng.randrange(0, 20) if index % 6 == 5 else None,
            )
        )
    return requests


def run_all(engine: InlineEngine, count: int, vocab_size: int) -> dict[str, Any]:
    """Run them with some hundred waiting at a time; how they ended, and what is left of them."""
    requests = mixed_requests(count, vocab_size)
    free_rows = engine.scheduler.num_free_rows
    added, active = 0, set[int]()
    while added < count or engine.scheduler.num_unfinished:
        while added < count and engine.scheduler.num_unfinished < 200:
            request = requests[added]
            engine.add(added, request.prompt, request.max_tokens, request.priority, **request.sampling)
            active.add(added)
            added += 1
        engine.turn()
        for index in sorted(active):
            after = requests[index].abort_after
            if after is not None and len(engine.token_ids(index)) >= after and not engine.finish_reason(index):
                engine.abort(index)
            if engine.finish_reason(index):
                active.discard(index)
    engine.run()
    stats = engine.scheduler.stats()
    return {
        "reasons": [engine.finish_reason(index) for index in range(count)],
        "num_tokens": sum(len(engine.token_ids(index)) for index in range(count)),
        "left": (
            stats.num_running,
            stats.num_waiting,
            stats.num_used_blocks,
            free_rows - engine.scheduler.num_free_rows,
        ),
        "num_preemptions": stats.num_preemptions,
    }
