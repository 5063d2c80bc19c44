"""`eagleray bench throughput`: what many requests get, all at once or as they arrive."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.prompts import Prompt
from eagleray.cluster.resolve import check_model
from eagleray.deploy.arguments import engine_config
from eagleray.deploy.bench_arguments import bench_params, goodput_limits
from eagleray.deploy.engine import chat_templates, measured_engine
from eagleray.deploy.load import Load, Planned
from eagleray.deploy.metrics import RequestTimes, ServingFigures, Spread, serving_figures
from eagleray.deploy.prompts import in_chat, read_file
from eagleray.deploy.record import check_writable, record, write
from eagleray.deploy.workload import Lengths, due_times, random_prompts

NUM_PROMPTS, INPUT_LEN = 1000, 1024  # where there is no dataset
WARM_UP_LEN = 32  # tokens, in place of a prompt that is text
TIMES = {
    "time_to_first_token_s": "time to first token",
    "time_per_output_token_s": "time per output token",
    "inter_token_latency_s": "inter-token latency",
    "latency_s": "end to end",
}


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if a request failed. Raises `ValueError` for what cannot be run before the engine starts."""
    config = engine_config(arguments)
    check_writable(arguments.output_json, "--output-json")
    limits = goodput_limits(arguments.goodput)
    planned = plan(arguments, config)
    err = Console(stderr=True)
    with measured_engine(config, err) as (engine, front_end):
        load = Load(engine, front_end)
        load.run(_warm_ups(planned, arguments.num_warmups, engine.info.vocab_size))
        requests = _run(load, planned, err)
        figures = serving_figures(requests, {name: most / 1000 for name, most in limits.items()})
        content = record("bench throughput", arguments, config, engine.info, [asdict(figures)])
    Console(file=sys.stdout).print(rates_table(figures, limits), "", times_table(figures), sep="\n")
    write(arguments.output_json, content)
    return _report_failures(requests)


def plan(arguments: argparse.Namespace, config: EngineConfig) -> list[Planned]:
    """The requests, in the order in which they are due. Raises `ValueError` for what cannot be."""
    rng = np.random.default_rng(arguments.workload_seed)
    model = check_model(config)
    limit = config.max_model_len or model.max_position_embeddings
    prompts: list[Prompt]
    if arguments.dataset is not None:
        prompts = _from_dataset(arguments, config)
        room = limit - 1
    else:
        count = arguments.num_prompts or NUM_PROMPTS
        lengths = Lengths(
            mean=arguments.input_len or INPUT_LEN,
            range_ratio=_ratio(arguments, "input"),
            sigma=arguments.input_len_sigma,
        ).draw(count, rng, limit // 2)
        prompts = list(random_prompts(lengths, model.vocab_size, rng))
        room = limit - max(lengths)
    outputs = Lengths(
        mean=arguments.output_len, range_ratio=_ratio(arguments, "output"), sigma=arguments.output_len_sigma
    ).draw(len(prompts), rng, max(room, 1))
    for prompt, output in zip(prompts, outputs, strict=True):
        if isinstance(prompt, list) and len(prompt) + output > limit:
            raise ValueError(
                f"a request has {len(prompt)} tokens in and {output} out, but the model holds {limit}; lower one"
            )
    due = due_times(len(prompts), arguments.request_rate, rng)
    return [Planned(p, bench_params(arguments, n), d) for p, n, d in zip(prompts, outputs, due, strict=True)]


def _ratio(arguments: argparse.Namespace, side: str) -> float:
    """The range ratio holds for the lengths that have no sigma of their own."""
    ratio: float = arguments.range_ratio
    both = arguments.input_len_sigma and arguments.output_len_sigma
    return ratio if both or not getattr(arguments, f"{side}_len_sigma") else 0.0


def _from_dataset(arguments: argparse.Namespace, config: EngineConfig) -> list[Prompt]:
    """The file's prompts, through the chat template if the model has one, as `eagleray generate` does it."""
    if arguments.input_len is not None or arguments.input_len_sigma:
        raise ValueError("--dataset brings its own prompts; leave out --input-len and --input-len-sigma")
    tasks = read_file(arguments.dataset, "--dataset")
    if arguments.num_prompts is not None and arguments.num_prompts > len(tasks):
        raise ValueError(
            f"--num-prompts is {arguments.num_prompts}, but {arguments.dataset} holds {len(tasks)}; lower it"
        )
    tasks = tasks[: arguments.num_prompts]
    if all(isinstance(task.prompt, list) for task in tasks):
        return [task.prompt for task in tasks]
    if not chat_templates(config.model, wanted=True if any(task.messages for task in tasks) else None):
        return [task.prompt for task in tasks]
    from eagleray.cluster.chat import chat_prompt  # these take a second, which only such a file needs
    from eagleray.cluster.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(config.model)
    chats = (in_chat(task, None) for task in tasks)
    return [chat_prompt(tokenizer, chat.messages, {}) if chat.messages else chat.prompt for chat in chats]


def _warm_ups(planned: list[Planned], count: int, vocab_size: int) -> list[Planned]:
    """The first requests, with other tokens: none that is measured may find its prefix already there."""
    alike = planned[:count]
    lengths = [len(each.prompt) if isinstance(each.prompt, list) else WARM_UP_LEN for each in alike]
    prompts = random_prompts(lengths, vocab_size, np.random.default_rng())
    return [replace(each, prompt=prompt, due=0.0) for each, prompt in zip(alike, prompts, strict=True)]


def _run(load: Load, planned: list[Planned], err: Console) -> list[RequestTimes]:
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=len(planned))
        return load.run(planned, on_end=lambda ended: progress.advance(task, len(ended)))


def rates_table(figures: ServingFigures, goodput: Mapping[str, float]) -> Table:
    """What was done, and how much of it in a second. `goodput` are milliseconds."""
    shown = Table(show_header=False, show_edge=False, box=None, padding=(0, 2, 0, 0))
    rates = [
        (
            "requests",
            f"{figures.num_requests - figures.num_failed} of {figures.num_requests} in {figures.duration_s:.2f} s",
        ),
        ("requests/s", f"{figures.requests_per_s:.2f}"),
        ("input tokens/s", f"{figures.input_tokens_per_s:.1f}"),
        ("output tokens/s", f"{figures.output_tokens_per_s:.1f}"),
        ("total tokens/s", f"{figures.total_tokens_per_s:.1f}"),
    ]
    if figures.goodput_requests_per_s is not None:
        limits = ", ".join(f"{name} {most:g} ms" for name, most in goodput.items())
        rates.append(("goodput requests/s", f"{figures.goodput_requests_per_s:.2f} within {limits}"))
    for name, value in rates:
        shown.add_row(name, value)
    return shown


def times_table(figures: ServingFigures) -> Table:
    """Mean and percentiles in milliseconds."""
    shown = Table(title="ms", title_justify="left")
    shown.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99"):
        shown.add_column(name, justify="right")
    for attribute, name in TIMES.items():
        times: Spread | None = getattr(figures, attribute)
        cells = ["-"] * 5 if times is None else [f"{value * 1000:.2f}" for value in asdict(times).values()]
        shown.add_row(name, *cells)
    return shown


def _report_failures(requests: list[RequestTimes]) -> int:
    """Each cause once."""
    causes = {request.error for request in requests if request.error is not None}
    for cause in sorted(causes):
        number = sum(request.error == cause for request in requests)
        print(f"eagleray: {number} of {len(requests)} requests failed: {cause}", file=sys.stderr)
    return int(bool(causes))
