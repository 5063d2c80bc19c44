"""Reads prompts from the command line, a file or standard input."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.cluster.frontend.prompts import Message
from eagleray.cluster.options import check_text
from eagleray.deploy.cli.utf8 import utf8_text

FORMS = 'give {"prompt": "text"}, {"prompt": [token ids]} or {"messages": [{"role": "user", "content": "text"}]}'


@dataclass(frozen=True)
class Task:
    """One prompt: text or token ids, or a conversation, which then stands in the prompt's place."""

    prompt: str | list[int] = ""
    messages: list[Message] | None = None

    @property
    def title(self) -> str:
        """What stands over the answer: the text, the last message, or how many token ids there are."""
        if self.messages is not None:
            return str(self.messages[-1].get("content", ""))
        return self.prompt if isinstance(self.prompt, str) else f"{len(self.prompt)} token ids"


def read_tasks(prompts: Sequence[str], file: Path | None) -> list[Task]:
    """The prompts given as arguments, else those of `file`, else those of standard input, if it is not a terminal.

    Raises `ValueError` when there is none or a line cannot be read.
    """
    if prompts and file is not None:
        raise ValueError(f"there are prompts both as arguments and in --file {file}; give one or the other")
    for prompt in prompts:
        check_text(prompt)  # an argument that is not UTF-8
    if prompts:
        return [Task(prompt=prompt) for prompt in prompts]
    if file is not None:
        return read_file(file, "--file")
    if not (tasks := _standard_input()):
        raise ValueError("there is no prompt; give one as an argument, with --file, or on standard input")
    return tasks


def read_file(file: Path, option: str) -> list[Task]:
    """The prompts of a file that `option` names, where - is standard input.

    Raises `ValueError`, which names the option, when there is none or a line cannot be read.
    """
    tasks = _standard_input() if str(file) == "-" else parse_lines(_text(file, option).split("\n"), f"{option} {file}")
    if not tasks:
        raise ValueError(f"{option} {file} holds no prompt; give one a line")
    return tasks


def _standard_input() -> list[Task]:
    if sys.stdin is None or sys.stdin.isatty():
        return []
    text = utf8_text(sys.stdin.buffer.read(), "standard input")
    return parse_lines(text.split("\n"), "standard input")


def _text(file: Path, option: str) -> str:
    try:
        return utf8_text(file.read_bytes(), f"{option} {file}")
    except OSError as error:
        raise ValueError(f"{option} {file} cannot be read: {error.strerror}; name a file of prompts") from error


def parse_lines(lines: Iterable[str], origin: str) -> list[Task]:
    """A task for every line that is not blank; a line that begins with `{` is a JSON object.

    Raises `ValueError`, which names the line, for the first that cannot be read.
    """
    tasks = []
    for number, line in enumerate(lines, 1):
        place = f"{origin}, line {number}"
        if line.lstrip().startswith("{"):
            tasks.append(_from_json(line.strip(), place))
        elif line.strip():
            _check_text(line, place)
            tasks.append(Task(prompt=line.rstrip("\r\n")))
    return tasks


def _check_text(text: str, place: str) -> None:
    """Half of a surrogate pair could not even be shown, beside the answers of all others."""
    try:
        check_text(text)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _from_json(text: str, place: str) -> Task:
    try:
        entry = json.loads(text)
        characters = json.dumps(entry, ensure_ascii=False)
    except (ValueError, RecursionError) as error:  # no JSON, a number of thousands of digits, lists ever deeper
        raise ValueError(f"{place} begins with {{ but cannot be read as JSON ({error}); {FORMS}") from error
    _check_text(characters, place)
    match entry:
        case {"prompt": str() | [*_] as prompt} if len(entry) == 1 and _is_prompt(prompt):
            return Task(prompt=prompt)
        case {"messages": [*messages]} if len(entry) == 1 and messages and all(map(_is_message, messages)):
            return Task(messages=messages)
    raise ValueError(f"{place} is {text[:80]}; {FORMS}")


def _is_prompt(prompt: str | list[Any]) -> bool:
    return isinstance(prompt, str) or all(type(token) is int for token in prompt)


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and isinstance(message.get("role"), str) and "content" in message


def in_chat(task: Task, system: str | None) -> Task:
    """The task as a conversation, after the system message if there is one; token ids stay what they are."""
    before: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    if task.messages is not None:
        return Task(messages=before + task.messages)
    if isinstance(task.prompt, str):
        return Task(messages=[*before, {"role": "user", "content": task.prompt}])
    return task
