"""One prompt's answer as it streams in, and as JSON."""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from eagleray.cluster.errors import counted
from eagleray.cluster.outputs import CompletionOutput, RequestOutput
from eagleray.deploy.cli.prompts import Task
from eagleray.deploy.cli.summary import num_output_tokens

FAILED, INTERRUPTED = "(failed)", "(interrupted)"


@dataclass
class Answer:
    """What is known so far of the prompt with this index."""

    index: int
    task: Task
    output: RequestOutput | None = None
    error: str | None = None

    @property
    def num_tokens(self) -> int:
        """Over all of its sequences."""
        return num_output_tokens(self.output) if self.output else 0

    @property
    def sequences(self) -> list[CompletionOutput]:
        """None before the first news, then `n`."""
        return self.output.outputs if self.output else []


class InOrder:
    """Hands on answers in the order of the prompts, each as soon as it and all before it are done."""

    def __init__(self, write: Callable[[Answer], None]) -> None:
        self._write = write
        self._next = 0
        self._held: dict[int, Answer] = {}

    def done(self, answer: Answer) -> None:
        """Called once for each answer, in any order."""
        self._held[answer.index] = answer
        while (ready := self._held.pop(self._next, None)) is not None:
            self._write(ready)
            self._next += 1

    def flush(self) -> None:
        """Hand on the rest, though answers before them are missing."""
        for index in sorted(self._held):
            self._write(self._held.pop(index))


def remark(sequence: CompletionOutput) -> str:
    """How a text ended, if not by itself: the text alone does not show it."""
    length = f"(cut at {counted(len(sequence.token_ids), 'token')})"
    endings = {"length": length, "abort": INTERRUPTED, None: INTERRUPTED}
    return endings.get(sequence.finish_reason, "")


def printable(text: str) -> str:
    """`text` with every control character but newline and tab replaced: a model must not steer the terminal."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\N{REPLACEMENT CHARACTER}" for c in text)


def as_json(answer: Answer) -> str:
    """One line: index, prompt or messages, then either the outputs or the error."""
    task = answer.task
    entry: dict[str, Any] = {"index": answer.index}
    entry |= {"prompt": task.prompt} if task.messages is None else {"messages": task.messages}
    if answer.output is not None:
        entry["num_prompt_tokens"] = len(answer.output.prompt_token_ids)
        entry["outputs"] = [_without_none(asdict(sequence)) for sequence in answer.sequences]
        if answer.output.prompt_logprobs is not None:
            entry["prompt_logprobs"] = answer.output.prompt_logprobs
    if answer.error is not None:
        entry["error"] = answer.error
    return json.dumps(msgspec.to_builtins(entry), ensure_ascii=False)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
