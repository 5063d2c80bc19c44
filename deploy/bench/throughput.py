"""`eagleray bench throughput`: measures many requests, sent all at once or as they arrive."""

import argparse
import sys
from dataclasses import asdict, replace

import numpy as np
from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import counted
from eagleray.cluster.frontend.prompts import Prompt
from eagleray.cluster.runtime.resolve import check_model, folder_of
from eagleray.deploy.bench.arguments import NUM_PROMPTS, bench_params, goodput_limits
from eagleray.deploy.bench.engine_load import Load, Planned
from eagleray.deploy.bench.lengths import check_fits, dataset_tasks, input_lengths, output_lengths
from eagleray.deploy.bench.metrics import RequestTimes, serving_figures
from eagleray.deploy.bench.report import check_writable, record, write
from eagleray.deploy.bench.views import rates_table, requests_bar, times_table
from eagleray.deploy.bench.workload import due_times, random_prompts, warm_up_lengths
from eagleray.deploy.cli.arguments import engine_config
from eagleray.deploy.cli.engine import chat_templates, measured_engine
from eagleray.deploy.cli.prompts import in_chat


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if a request failed. Raises `ValueError`, before the engine starts, for what cannot be run."""
    config = engine_config(arguments)
    check_writable(arguments.output_json, "--output-json")
    limits = goodput_limits(arguments.goodput)
    planned = plan(arguments, config)
    err = Console(stderr=True)
    with measured_engine(config, err) as (engine, front_end):
        load = Load(engine, front_end)
        load.measure(_warm_ups(planned, arguments.num_warmups, engine.info.vocab_size))
        requests = _run(load, planned, err)
        figures = serving_figures(requests, {name: most / 1000 for name, most in limits.items()})
        content = record("bench throughput", arguments, config, engine.info, [asdict(figures)])
    Console(file=sys.stdout).print(rates_table(figures, limits), "", times_table(figures), sep="\n")
    write(arguments.output_json, content)
    return _report_failures(requests)


def plan(arguments: argparse.Namespace, config: EngineConfig) -> list[Planned]:
    """The requests, in the order in which they are due. Raises `ValueError` for options that do not work together."""
    rng = np.random.default_rng(arguments.workload_seed)
    model = check_model(config)
    limit = config.max_model_len or model.max_position_embeddings
    prompts: list[Prompt]
    if arguments.dataset is not None:
        prompts = _from_dataset(arguments, config)
        room = limit - 1
    else:
        count = arguments.num_prompts or NUM_PROMPTS
        lengths = input_lengths(arguments, count, rng, limit // 2)
        prompts = list(random_prompts(lengths, model.vocab_size, rng))
        room = limit - max(lengths)
    outputs = output_lengths(arguments, len(prompts), rng, max(room, 1))
    for prompt, output in zip(prompts, outputs, strict=True):
        if isinstance(prompt, list):
            check_fits(len(prompt), output, limit)
    due = due_times(len(prompts), arguments.request_rate, rng)
    return [Planned(p, bench_params(arguments, n), d) for p, n, d in zip(prompts, outputs, due, strict=True)]


def _from_dataset(arguments: argparse.Namespace, config: EngineConfig) -> list[Prompt]:
    """The file's prompts, through the chat template if the model has one, as `eagleray generate` does it."""
    tasks = dataset_tasks(arguments)
    if all(isinstance(task.prompt, list) for task in tasks):
        return [task.prompt for task in tasks]
    if not chat_templates(config, wanted=True if any(task.messages for task in tasks) else None):
        return [task.prompt for task in tasks]
    from eagleray.cluster.frontend.chat import chat_prompt  # these take a second, which only such a file needs
    from eagleray.cluster.frontend.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_dir(folder_of(config))
    chats = (in_chat(task, None) for task in tasks)
    return [chat_prompt(tokenizer, chat.messages, {}) if chat.messages else chat.prompt for chat in chats]


def _warm_ups(planned: list[Planned], count: int, vocab_size: int) -> list[Planned]:
    """The first requests, with other tokens, so that no measured request finds its prefix in the cache."""
    alike = planned[:count]
    lengths = warm_up_lengths([each.prompt for each in alike])
    prompts = random_prompts(lengths, vocab_size, np.random.default_rng())
    return [replace(each, prompt=prompt, due=0.0) for each, prompt in zip(alike, prompts, strict=True)]


def _run(load: Load, planned: list[Planned], err: Console) -> list[RequestTimes]:
    with requests_bar(len(planned), err) as advance:
        return load.measure(planned, on_end=lambda ended: advance(len(ended)))


def _report_failures(requests: list[RequestTimes]) -> int:
    """Each cause once."""
    causes = {request.error for request in requests if request.error is not None}
    for cause in sorted(causes):
        number = sum(request.error == cause for request in requests)
        print(f"eagleray: {number} of {counted(len(requests), 'request')} failed: {cause}", file=sys.stderr)
    return int(bool(causes))
