"""Failures of the engine, told in OpenAI's shape: before an answer by its status, within a stream by its last event."""

import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.http_client import post
from support.http_server import Server, serving
from support.local_engine import LocalEngine

BODY: dict[str, Any] = {"prompt": "On and on", "max_tokens": 50, "ignore_eos": True}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 50, "ignore_eos": True}
BODIES = {"/v1/completions": BODY, "/v1/chat/completions": CHAT}


@pytest.fixture
def engine() -> LocalEngine:
    return LocalEngine()


@pytest.fixture
def make_server(engine: LocalEngine, demo_tokenizer: Tokenizer) -> Iterator[Callable[..., Server]]:
    """Starts a server over `engine`; without a tokenizer if that is asked for."""
    limits = ModelLimits(max_model_len=256, vocab_size=49_152, eos_token_ids=frozenset({2}))
    started = []

    def make(*, tokenizer: bool = True) -> Server:
        front_end = FrontEnd(demo_tokenizer if tokenizer else None, limits)
        context = serving(AsyncClient(engine, front_end), "local", 256)
        started.append(context)
        return context.__enter__()

    yield make
    for context in started:
        context.__exit__(None, None, None)


@pytest.fixture
def server(make_server: Callable[..., Server]) -> Server:
    return make_server()


def ask(server: Server, path: str, **changes: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=BODIES[path] | changes, timeout=30)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_at_once_is_a_500_and_the_next_goes_on(
    server: Server, engine: LocalEngine, path: str, stream: bool
) -> None:
    engine.fails_at = engine.num_calls + 1
    answer = ask(server, path, stream=stream)
    assert answer.status_code == 500
    expected = {
        "message": "the engine failed: rank 1 says no",
        "type": "server_error",
        "param": None,
        "code": "engine_error",
    }
    assert answer.json() == {"error": expected}
    assert ask(server, path, stream=stream).status_code == 200


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("failure", "code"), [(None, "engine_error"), (EngineDeadError("rank 1 is gone"), "engine_dead")]
)
def test_a_failure_within_a_stream_is_its_last_event(
    server: Server, engine: LocalEngine, path: str, failure: EngineDeadError | None, code: str
) -> None:
    if failure is None:
        engine.fails_at = engine.num_calls + 10
    else:
        engine.failures = {engine.num_calls + 10: failure}
    answer = ask(server, path, stream=True)
    *events, last, end = answer.text.split("\n\n")
    assert (answer.status_code, end) == (200, "")
    assert len(events) > 3
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
    name, data = last.split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("server_error", code)


def test_many_streams_that_fail_together_are_one_line_each(
    server: Server, engine: LocalEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.waits_for = 32  # calls count from then on
    engine.fails_at = engine.num_calls + 10

    def stream(_: int) -> str:
        return ask(server, "/v1/completions", stream=True).text

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(stream, range(32)))
    assert all("rank 1 says no" in answer for answer in answers)
    told = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert [record.getMessage() for record in told] == ["a stream ends early: the engine failed: rank 1 says no"] * 32
    assert not any(record.exc_info for record in told)


def test_the_client_library_raises_what_a_stream_says(server: Server, engine: LocalEngine) -> None:
    engine.fails_at = engine.num_calls + 10
    extra = {"ignore_eos": True}
    stream = server.openai.completions.create(
        model="local", prompt="On and on", max_tokens=50, stream=True, extra_body=extra
    )
    with pytest.raises(openai.APIError, match="the engine failed: rank 1 says no") as caught:
        list(stream)
    assert caught.value.code == "engine_error"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_dead_engine_is_a_503(server: Server, engine: LocalEngine, path: str, stream: bool) -> None:
    engine.failures = {engine.num_calls + 1: EngineDeadError("rank 1 is gone")}
    for _ in range(2):
        answer = ask(server, path, stream=stream)
        assert answer.status_code == 503
        message = "the engine is gone: rank 1 is gone; try again later"
        expected = {"message": message, "type": "server_error", "param": None, "code": "engine_dead"}
        assert answer.json() == {"error": expected}


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_whose_engine_was_closed_is_a_503(server: Server, stream: bool) -> None:
    server.on_loop(_close(server))
    for path in BODIES:
        answer = ask(server, path, stream=stream)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_closed")
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


async def _close(server: Server) -> None:
    server.engine.close()


@pytest.mark.parametrize("stream", [False, True])
def test_one_bad_prompt_of_several_ends_the_others(server: Server, engine: LocalEngine, stream: bool) -> None:
    answer = ask(server, "/v1/completions", prompt=[[5, 6], [50_000], [7]], max_tokens=200, stream=stream)
    assert answer.status_code == 400
    assert "token id 50000" in answer.json()["error"]["message"]
    server.wait_until(lambda: engine.scheduler.num_unfinished == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_server_ends_is_a_503_or_an_event(server: Server, engine: LocalEngine, stream: bool) -> None:
    def abort() -> None:
        server.wait_until(lambda: bool(server.engine._front_end._generations))
        (request_id,) = server.engine._front_end._generations
        server.on_loop(server.engine.abort(request_id))

    thread = threading.Thread(target=abort)
    thread.start()
    answer = ask(server, "/v1/completions", stream=stream, max_tokens=240)
    thread.join()
    assert '"code": "aborted"' in answer.text
    assert answer.status_code in ((200, 503) if stream else (503,))


def test_without_a_tokenizer_ids_do_and_texts_are_refused(
    make_server: Callable[..., Server], engine: LocalEngine
) -> None:
    server = make_server(tokenizer=False)
    answer = post(server, "/v1/completions", prompt=[5, 6], max_tokens=3)
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 3)
    refused = [
        ask(server, "/v1/completions"),
        ask(server, "/v1/completions", prompt=[5, 6], echo=True),
        ask(server, "/v1/chat/completions"),
        httpx.post(server.url + "/tokenize", json={"prompt": "a"}),
        httpx.post(server.url + "/detokenize", json={"tokens": [5]}),
    ]
    for refusal in refused:
        assert refusal.status_code == 400
        assert "this server has no tokenizer" in refusal.json()["error"]["message"]
    assert ask(server, "/v1/completions", prompt=[5, 6], stop="a").status_code == 400
