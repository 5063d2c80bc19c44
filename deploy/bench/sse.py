"""Reads the server-sent events of a streamed answer: the times of its tokens, or why it failed."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

MAX_MESSAGE = 300  # characters of what a server says of a failure
TEXTS = ("content", "reasoning_content", "reasoning")  # of a delta; the latter two are other servers' for thoughts


class Failure(Exception):
    """A request that failed: `kind` is for counting, `message` what was said of it."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message


@dataclass(frozen=True, slots=True)
class HttpAnswer:
    """A whole answer; its tokens are those that the server counted."""

    num_input_tokens: int
    token_times: list[float]
    num_events: int


def answer_of(events: Sequence[tuple[float, bytes]]) -> HttpAnswer:
    """`events` are times and what came after `data:`. Raises `Failure` if the answer is malformed or incomplete."""
    parts: list[tuple[float, bool]] = []  # time, and whether there is text
    usage: object = None
    done = bool(events) and events[-1][1] == b"[DONE]"
    for when, data in events[: len(events) - done]:
        event = _parse(data)
        usage = event.get("usage") or usage
        parts += [(when, _has_text(choice)) for choice in event.get("choices") or ()]
    if not done:
        raise Failure("cut off", "the stream ended before [DONE]")
    match usage:
        case {"prompt_tokens": int(num_input), "completion_tokens": int(num_output)}:
            times = spread_tokens(parts, num_output)
        case _:
            raise Failure("no usage", "the server did not count its tokens, as stream_options.include_usage asks")
    if not times:
        raise Failure("no tokens", "the answer is empty")
    return HttpAnswer(num_input, times, len(parts))


def spread_tokens(parts: Sequence[tuple[float, bool]], num_tokens: int) -> list[float]:
    """When each token came. `parts` are the events' times, and whether they hold text.

    As many events as tokens are a token each. Otherwise some hold several tokens, or none: those without text are left
    out, if any has text, and the tokens are laid evenly over the rest, so that the first and the last are where they
    were. Tokens of one event came at once.
    """
    if len(parts) != num_tokens:
        parts = [part for part in parts if part[1]] or parts
    if not parts or num_tokens < 1:
        return []
    last = len(parts) - 1
    return [parts[round(i * last / max(num_tokens - 1, 1))][0] for i in range(num_tokens)]


def error_message(body: bytes) -> str:
    """OpenAI's message if there is one, else the beginning of the body."""
    text = body.decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):  # a proxy's page, say
        text = json.loads(text)["error"]["message"]
    return str(text)[:MAX_MESSAGE].strip()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise Failure("no JSON", f"{data[:MAX_MESSAGE].decode(errors='replace')!r}: {error}") from error
    if not isinstance(event, dict):
        raise Failure("no JSON", f"an event is {str(event)[:MAX_MESSAGE]}, which is not an object")
    if event.get("error") is not None:
        raise Failure("error event", error_message(data))
    return event


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(choice.get("text") or any(delta.get(name) for name in TEXTS))
