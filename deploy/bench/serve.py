"""`eagleray bench serve`: measures a server with OpenAI's API under many clients."""

import argparse
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from eagleray.cluster.errors import counted
from eagleray.cluster.frontend.prompts import Message
from eagleray.deploy.bench.arguments import NUM_PROMPTS, SAMPLED_BY, bench_params, goodput_limits
from eagleray.deploy.bench.http_load import Ask, Exchange, HttpLoad, is_here
from eagleray.deploy.bench.lengths import check_fits, dataset_tasks, input_lengths, output_lengths
from eagleray.deploy.bench.metrics import serving_figures, spread
from eagleray.deploy.bench.report import check_writable, record, write
from eagleray.deploy.bench.views import rates_table, requests_bar, times_table
from eagleray.deploy.bench.workload import due_times, random_prompts, warm_up_lengths
from eagleray.deploy.cli.ending import run_async
from eagleray.deploy.cli.prompts import Task, in_chat
from eagleray.models.loading.demo_model import NAME
from eagleray.models.loading.model_dir import DEMO

KEY_VARIABLE = "OPENAI_API_KEY"
PATHS = {"completions": "/completions", "chat": "/chat/completions"}
MAX_BUSY = 0.8  # of a core, above which a client is likely to keep events waiting
WORDS = (  # a token each in most vocabularies
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work number night point home water room mother area money "
    "story fact month lot right study book eye job word business issue side kind head house service friend father"
)

Prompt = str | list[int] | list[Message]


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if a request failed. Raises `ValueError`, before anything is sent, for what cannot be asked."""
    check_writable(arguments.output_json, "--output-json")
    limits = goodput_limits(arguments.goodput)
    headers = _key_header(arguments.api_key_env)
    arguments.model = _served_name(arguments, headers)
    load = HttpLoad(
        arguments.base_url + PATHS[arguments.endpoint],
        headers,
        arguments.timeout,
        arguments.max_concurrency,
    )
    asks = plan(arguments)
    if failed := _failures(run_async(partial(load.measure, warm_ups(arguments, asks)))):
        return _report(failed, "warm-up request")
    with requests_bar(len(asks), Console(stderr=True)) as advance:
        cpu_s, start = time.process_time(), time.monotonic()
        exchanges = run_async(partial(load.measure, asks, advance))
        busy = (time.process_time() - cpu_s) / (time.monotonic() - start)
    figures = serving_figures((each.times for each in exchanges), {name: ms / 1000 for name, ms in limits.items()})
    case = asdict(figures) | _about_sending(exchanges) | {"client_busy_share": busy}
    Console(file=sys.stdout).print(rates_table(figures, limits), "", times_table(figures), sep="\n")
    write(arguments.output_json, record("bench serve", arguments, None, None, [case]))
    if busy > MAX_BUSY:
        print(
            f"eagleray: this client computed {busy:.0%} of the time, so some of the times are its own; run several "
            "side by side, each with a part of the load and a --seed of its own",
            file=sys.stderr,
        )
    return _report(_failures(exchanges), "request", len(exchanges))


def plan(arguments: argparse.Namespace) -> list[Ask]:
    """The requests, in the order in which they are due. Raises `ValueError` for options that do not work together.

    With equal options and a model's vocabulary size they are those of `eagleray bench throughput`.
    """
    rng = np.random.default_rng(arguments.workload_seed)
    limit = arguments.max_model_len
    if limit is None and (arguments.input_len_sigma or arguments.output_len_sigma):
        raise ValueError("log-normal lengths have a long tail; give --max-model-len, where it is cut")
    prompts: list[Prompt]
    room = limit and limit - 1
    if arguments.dataset is not None:
        prompts = [_from_task(task, arguments) for task in dataset_tasks(arguments)]
    else:
        lengths = input_lengths(arguments, arguments.num_prompts or NUM_PROMPTS, rng, (limit or 0) // 2)
        prompts = _drawn(arguments, lengths, rng)
        room = limit and limit - max(lengths)
    outputs = output_lengths(arguments, len(prompts), rng, max(room or 1, 1))
    for prompt, output in zip(prompts, outputs, strict=True):
        if limit is not None and arguments.endpoint == "completions" and isinstance(prompt, list):
            check_fits(len(prompt), output, limit)
    due = due_times(len(prompts), arguments.request_rate, rng)
    return [Ask(_body(arguments, p, n), d) for p, n, d in zip(prompts, outputs, due, strict=True)]


def warm_ups(arguments: argparse.Namespace, asks: Sequence[Ask]) -> list[Ask]:
    """The first requests, with other tokens, so that no measured request finds its prefix in the cache."""
    rng = np.random.default_rng()
    prompts = [ask.body.get("prompt") for ask in asks[: arguments.num_warmups]]
    drawn = _drawn(arguments, warm_up_lengths(prompts), rng)
    return [Ask(_body(arguments, p, ask.body["max_tokens"])) for p, ask in zip(drawn, asks, strict=False)]


def _drawn(arguments: argparse.Namespace, lengths: Sequence[int], rng: np.random.Generator) -> list[Prompt]:
    """Token ids; for a chat, as many words, to which the server's template adds its own."""
    if arguments.endpoint == "chat":
        return [" ".join(rng.choice(WORDS.split(), length)) for length in lengths]
    return list(random_prompts(lengths, arguments.vocab_size, rng))


def _from_task(task: Task, arguments: argparse.Namespace) -> Prompt:
    if arguments.endpoint == "completions":
        if task.messages is not None:
            raise ValueError(f"--dataset {arguments.dataset} holds messages; give --endpoint chat")
        return task.prompt
    messages = in_chat(task, None).messages
    if messages is None:
        raise ValueError(f"--dataset {arguments.dataset} holds token ids; give --endpoint completions")
    return messages


def _body(arguments: argparse.Namespace, prompt: Prompt, max_tokens: int) -> dict[str, Any]:
    """Raises `ValueError` for sampling options out of range."""
    bench_params(arguments, max_tokens)
    chat = arguments.endpoint == "chat"
    asked = [{"role": "user", "content": prompt}] if chat and isinstance(prompt, str) else prompt
    return {
        "model": arguments.model,
        "messages" if chat else "prompt": asked,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if arguments.ignore_eos else {}),
        **{name: getattr(arguments, name) for name in SAMPLED_BY if hasattr(arguments, name)},
    }


def _served_name(arguments: argparse.Namespace, headers: Mapping[str, str]) -> str:
    """The model's name on the server: "demo" stands for the demo model, None for the only model there."""
    if arguments.model not in (None, DEMO):
        return str(arguments.model)
    url = f"{arguments.base_url}/models"
    try:
        reply = httpx.get(url, headers=headers, timeout=arguments.timeout, trust_env=not is_here(url))
        names = [str(entry["id"]) for entry in reply.raise_for_status().json()["data"]]
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{url} does not say which models there are ({error}); name one with --model") from error
    wanted = names if arguments.model is None else [name for name in names if name in (DEMO, NAME)]
    if len(wanted) != 1:
        listed = ", ".join(names) or "none"
        raise ValueError(f"the server at {arguments.base_url} has these models: {listed}; name one with --model")
    return wanted[0]


def _key_header(variable: str | None) -> dict[str, str]:
    key = os.environ.get(variable or KEY_VARIABLE, "").strip()
    if variable is not None and not key:
        raise ValueError(f"--api-key-env names {variable}, which is not set; set it, or leave the option out")
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the key in {variable or KEY_VARIABLE} has characters that no header may hold; set it anew")
    return {"authorization": f"Bearer {key}"} if key else {}


def _about_sending(exchanges: Sequence[Exchange]) -> dict[str, Any]:
    lags = spread([each.sent - each.times.due for each in exchanges])
    return {
        "num_events": sum(each.num_events for each in exchanges),
        "send_lag_s": None if lags is None else asdict(lags),  # what of the times is this client's own
        "errors": {kind: {"count": count, "first": first} for kind, (count, first) in _failures(exchanges).items()},
    }


def _failures(exchanges: Sequence[Exchange]) -> dict[str, tuple[int, str]]:
    """How many there are of each kind, the most frequent first, and what was said of the first one."""
    failed = [(each.times.error, each.message) for each in exchanges if each.times.error is not None]
    messages = dict(reversed(failed))
    return {kind: (count, messages[kind]) for kind, count in Counter(kind for kind, _ in failed).most_common()}


def _report(failures: dict[str, tuple[int, str]], what: str, num_in_all: int | None = None) -> int:
    for kind, (count, message) in failures.items():
        failed = counted(count, what) if num_in_all is None else f"{count} of {counted(num_in_all, what)}"
        print(f"eagleray: {failed} failed: {kind}: {message}", file=sys.stderr)
    return int(bool(failures))
