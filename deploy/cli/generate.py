"""`eagleray generate`: sends all prompts to the engine and streams their answers."""

import argparse
import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.outputs import RequestOutput
from eagleray.cluster.runtime.resolve import folder_of
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.cli.answers import Answer, as_json
from eagleray.deploy.cli.arguments import check_sampling, engine_config, sampling_params
from eagleray.deploy.cli.ending import run_async
from eagleray.deploy.cli.engine import chat_templates, running_engine
from eagleray.deploy.cli.prompts import in_chat, read_tasks
from eagleray.deploy.cli.render import write_plain
from eagleray.deploy.cli.summary import Figures
from eagleray.deploy.cli.views import PlainView, TerminalView, View

if TYPE_CHECKING:
    from eagleray.cluster.frontend.async_client import AsyncClient

MAX_OPEN = 1024  # requests handed to the engine at once: enough for it to choose from, however long the file


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if a request failed. Raises `ValueError`, `EngineStartError` or `DemoModelError` before the first one."""
    check_sampling(arguments)
    if arguments.chat is False and arguments.system is not None:
        raise ValueError("--system needs the chat template, which --raw leaves out; drop one of the two")
    tasks = read_tasks(arguments.prompts, arguments.file)
    config = engine_config(arguments)
    params = sampling_params(arguments, folder_of(config))
    wanted = True if arguments.system is not None else arguments.chat  # or None: wherever there is a template
    if chat_templates(config, wanted=wanted):
        tasks = [in_chat(task, arguments.system) for task in tasks]
    answers = [Answer(index, task) for index, task in enumerate(tasks)]
    err = Console(stderr=True)
    view = _view(arguments.json, err, len(answers))
    with running_engine(config, err) as engine:
        started = time.monotonic()
        try:
            run_async(partial(_answer_all, engine, answers, params, view))
        finally:
            _report(answers, time.monotonic() - started, err)
    return int(any(answer.error for answer in answers))


def _view(json: bool, err: Console, num_requests: int) -> View:
    if sys.stdout.isatty() and not json:
        return TerminalView(Console(), num_requests)
    if json:
        bar = Console(stderr=True, force_terminal=False) if sys.stdout.isatty() else err  # not where the answers go
        return PlainView(lambda answer: print(as_json(answer), flush=True), bar, num_requests)
    return PlainView(write_plain(sys.stdout, titled=num_requests > 1), err, num_requests)


async def _answer_all(engine: "AsyncClient", answers: Sequence[Answer], params: SamplingParams, view: View) -> None:
    todo = iter(answers)
    with view:
        await asyncio.gather(*(_answer_some(engine, todo, params, view) for _ in answers[:MAX_OPEN]))


async def _answer_some(engine: "AsyncClient", todo: Iterator[Answer], params: SamplingParams, view: View) -> None:
    """Take one answer after another from what all of these share."""
    for answer in todo:
        try:
            async for output in _stream(engine, answer, params):
                answer.output = output
                view.news(answer)
            answer.error = next((sequence.error for sequence in answer.sequences if sequence.error), None)
        except (ValueError, EngineDeadError) as error:  # a bad prompt hurts no other; after a death all get the cause
            answer.error = str(error)
        view.done(answer)


def _stream(engine: "AsyncClient", answer: Answer, params: SamplingParams) -> AsyncIterator[RequestOutput]:
    task, request_id = answer.task, str(answer.index)
    if task.messages is not None:
        return engine.chat(task.messages, params, request_id)
    return engine.generate(task.prompt, params, request_id)


def _report(answers: Sequence[Answer], elapsed: float, err: Console) -> None:
    """Print the figures, and each error once with the prompts that it ended."""
    outputs = [answer.output for answer in answers if answer.output is not None]
    err.print(Figures.of(outputs, elapsed).line(), style="dim", highlight=False, soft_wrap=not err.is_terminal)
    failed: dict[str, list[str]] = {}
    for answer in answers:
        if answer.error is not None:
            failed.setdefault(answer.error, []).append(str(answer.index + 1))
    for error, numbers in failed.items():
        some = ", ".join(numbers[:5]) + (", …" if len(numbers) > 5 else "")
        print(f"eagleray: prompt{'s' * (len(numbers) > 1)} {some}: {error}", file=sys.stderr)
