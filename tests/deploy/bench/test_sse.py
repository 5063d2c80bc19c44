"""What is read out of streams, against streams written by hand."""

import json
from typing import Any

import pytest

from eagleray.deploy.bench.sse import Failure, answer_of, error_message, spread_tokens

USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 3}}


def stream(*events: dict[str, Any] | bytes) -> list[tuple[float, bytes]]:
    """An event a second from the first second on."""
    return [
        (float(number), event if isinstance(event, bytes) else json.dumps(event).encode())
        for number, event in enumerate(events, 1)
    ]


def text(value: str) -> dict[str, Any]:
    return {"choices": [{"text": value}]}


def delta(**fields: Any) -> dict[str, Any]:
    return {"choices": [{"delta": fields}]}


def test_an_event_for_each_token_is_its_time_even_without_text() -> None:
    answer = answer_of(stream(text(""), text("a"), text("b"), USAGE, b"[DONE]"))
    assert (answer.num_input_tokens, answer.token_times, answer.num_events) == (5, [1.0, 2.0, 3.0], 3)


def test_a_chats_first_event_of_a_role_alone_is_no_token() -> None:
    events = stream(delta(role="assistant", content=""), delta(content="a"), delta(content="b"), delta(content="c"))
    assert answer_of([*events, *stream(delta(), USAGE, b"[DONE]")]).token_times == [2.0, 3.0, 4.0]


def test_thoughts_are_tokens_too() -> None:
    events = stream(delta(role="assistant"), delta(reasoning_content="a"), delta(reasoning="b"), delta(content="c"))
    assert answer_of([*events, *stream(USAGE, b"[DONE]")]).token_times == [2.0, 3.0, 4.0]


def test_tokens_that_came_together_are_laid_evenly_over_the_events() -> None:
    parts = [(1.0, True), (2.0, True), (4.0, True)]
    assert spread_tokens(parts, 5) == [1.0, 1.0, 2.0, 4.0, 4.0]
    assert spread_tokens(parts, 2) == [1.0, 4.0]
    assert spread_tokens(parts, 1) == [1.0]
    assert spread_tokens([(1.0, False), (3.0, False)], 1) == [1.0]
    assert spread_tokens([], 3) == []
    assert spread_tokens(parts, 0) == []


@pytest.mark.parametrize(
    ("events", "kind", "message"),
    [
        ([], "cut off", "before [DONE]"),
        ([text("a"), text("b")], "cut off", "before [DONE]"),
        ([text("a"), {"error": {"message": "no memory"}}], "error event", "no memory"),
        ([text("a"), {"error": "odd"}], "error event", "odd"),
        ([text("a"), b"[DONE]"], "no usage", "include_usage"),
        ([text("a"), {"usage": {"prompt_tokens": 3}}, b"[DONE]"], "no usage", "include_usage"),
        ([USAGE, b"[DONE]"], "no tokens", "empty"),
        ([b"{", b"[DONE]"], "no JSON", "'{'"),
        ([b"[1]", b"[DONE]"], "no JSON", "[1]"),
    ],
)
def test_what_is_no_whole_answer_has_a_kind(events: list[Any], kind: str, message: str) -> None:
    with pytest.raises(Failure) as failure:
        answer_of(stream(*events))
    assert failure.value.kind == kind
    assert message in failure.value.message


def test_an_errors_message_is_openais_or_the_beginning_of_what_came() -> None:
    assert error_message(b'{"error": {"message": "too long"}}') == "too long"
    assert error_message(b"<html>" + b"x" * 1000) == "<html>" + "x" * 294
    assert error_message(b'{"error": null}') == '{"error": null}'
    assert error_message(b"\xff") == "\ufffd"
