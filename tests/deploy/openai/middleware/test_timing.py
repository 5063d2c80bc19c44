"""What a request spends outside the engine: it and the engine's parts are the whole time in the server."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.middleware.timing import HttpTime
from eagleray.deploy.openai.served_model import ServedModel
from support.asgi_server import asgi_server
from support.local_engine import LocalEngine

SLOW_S = 0.3
BODY: dict[str, Any] = {"prompt": "On and on", "max_tokens": 5, "ignore_eos": True}


class Seen:
    """A server, and what it told of its requests."""

    def __init__(self) -> None:
        self.url = ""
        self.http_s: list[float] = []
        self.ended: list[RequestState] = []
        self.begun = threading.Event()  # a request is there, and its time runs

    def post(self, content: Any = None, **body: Any) -> float:
        """How long a request took, from before it was sent until the server was done with it."""
        begin = time.monotonic()
        given = {"content": content} if content is not None else {"json": BODY | body}
        headers = {"content-type": "application/json"}
        httpx.post(f"{self.url}/v1/completions", **given, headers=headers, timeout=30).raise_for_status()
        while len(self.http_s) < 1:  # the answer is there before the server is done with it
            assert time.monotonic() < begin + 30
            time.sleep(0.002)
        return time.monotonic() - begin


@pytest.fixture
def seen(demo_tokenizer: Tokenizer) -> Iterator[Seen]:
    seen = Seen()
    limits = ModelLimits(max_model_len=1500, vocab_size=49_152, eos_token_ids=frozenset({2}))
    llm = AsyncClient(LocalEngine(), FrontEnd(demo_tokenizer, limits, on_end=seen.ended.append))
    inner = make_app(ServedModel(llm, "local", 1500, created=0))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.begun.set()
        await inner(scope, receive, send)

    with asgi_server(HttpTime(app, seen.http_s.append), llm.close) as seen.url:
        yield seen


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["On and on", ["On", "and", "on"]])
def test_each_request_counts_once_and_with_the_engine_fills_the_clients_time(
    seen: Seen, stream: bool, prompt: str | list[str]
) -> None:
    passed = seen.post(stream=stream, prompt=prompt, max_tokens=300)
    (http_s,) = seen.http_s
    assert len(seen.ended) == (1 if isinstance(prompt, str) else 3)
    ends = [generation.finished_time for generation in seen.ended if generation.finished_time is not None]
    engine_s = max(ends) - min(generation.arrival_time for generation in seen.ended)
    assert 0 < http_s < passed - engine_s


def test_a_body_that_comes_slowly_is_http_and_nothing_else(seen: Seen) -> None:
    whole: list[float] = []

    def slowly() -> Iterator[bytes]:
        yield b'{"prompt": "On and on", '
        assert seen.begun.wait(30)
        time.sleep(SLOW_S)
        whole.append(time.monotonic())
        yield b'"max_tokens": 1}'

    seen.post(slowly())
    assert seen.http_s[0] >= SLOW_S
    (generation,) = seen.ended
    assert generation.arrival_time >= whole[0], "until its body is there, a request is not with the engine"


def test_requests_that_never_reach_the_engine_do_not_count(seen: Seen) -> None:
    assert httpx.post(f"{seen.url}/v1/completions", json=BODY | {"top_p": 7}).status_code == 400
    assert httpx.get(f"{seen.url}/v1/models").status_code == 200
    assert seen.http_s == []
