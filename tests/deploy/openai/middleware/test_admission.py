"""Admission as pure ASGI: no server, no engine."""

import asyncio
import json
import logging
import re
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from eagleray.cluster.core.messages import EngineRequest, RequestMessage, Submit
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.middleware.admission import (
    ApiKeys,
    BoundedQueue,
    may_generate,
)
from eagleray.deploy.openai.middleware.api_keys import key_digest
from eagleray.deploy.openai.middleware.bodies import BodyLimit
from eagleray.deploy.openai.middleware.cors import cross_origin
from eagleray.deploy.openai.middleware.probes import Figures, Health
from eagleray.deploy.openai.middleware.request_ids import RequestIds
from eagleray.deploy.openai.middleware.respond import answer, refuse
from eagleray.deploy.openai.request_context import place_taken, tenant_asking
from eagleray.deploy.openai.served_model import ServedModel
from support.asgi import client, length_of_body
from support.local_engine import LocalEngine


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer one", 200),
        ("bearer two", 200),
        ("Bearer  one ", 200),
        ("Bearer three", 401),
        ("Bearer on", 401),
        ("Bearer ", 401),
        ("Basic one", 401),
        ("one", 401),
        (None, 401),
    ],
)
async def test_a_key_must_be_one_of_the_keys(header: str | None, status: int) -> None:
    async with client(ApiKeys(length_of_body, ["one", "two"])) as http:
        reply = await http.get("/v1/models", headers={} if header is None else {"authorization": header})
    assert reply.status_code == status
    if status == 401:
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.json()["error"]["code"] == "invalid_api_key"


async def test_a_keys_digest_is_enough_to_know_it() -> None:
    async with client(ApiKeys(length_of_body, [], [key_digest("one")])) as http:
        statuses = [
            (await http.get("/", headers={"authorization": f"Bearer {key}"})).status_code
            for key in ("one", "two", key_digest("one").hex())
        ]
    assert statuses == [200, 401, 401]


async def test_without_keys_everybody_comes_in_and_keys_are_not_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with client(ApiKeys(length_of_body, [])) as http:
        assert (await http.get("/")).status_code == 200
    caplog.set_level(logging.DEBUG)
    async with client(RequestIds(ApiKeys(length_of_body, ["secret"]), reply=True)) as http:
        for key in ("secret", "wrong-secret"):
            await http.get("/", headers={"authorization": f"Bearer {key}"})
    assert "secret" not in "".join(record.getMessage() for record in caplog.records if "eagleray" in record.name)


async def test_other_connections_need_a_key_too() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing is to be read")

    await ApiKeys(length_of_body, ["one"])({"type": "websocket", "headers": []}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_the_queue_takes_as_many_as_it_may_and_one_more_once_one_is_done() -> None:
    go_on, num_inside = asyncio.Event(), 0

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal num_inside
        num_inside += 1
        await go_on.wait()
        await answer(send, 200, b"", "text/plain")

    async with client(BoundedQueue(slow, 3)) as http:
        running = [asyncio.create_task(http.post("/v1/completions")) for _ in range(3)]
        while num_inside < 3:
            await asyncio.sleep(0)
        refused = await http.post("/v1/chat/completions")
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        running[0].cancel()
        await asyncio.wait(running[:1])
        running[0] = asyncio.create_task(http.post("/v1/completions"))
        while num_inside < 4:
            await asyncio.sleep(0)
        go_on.set()
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200] * 3
        assert (await http.get("/v1/models")).status_code == 200


class Held:
    """An application whose requests want as many choices as their path's last part says, and go on until told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        place = place_taken.get()
        assert place is not None
        try:
            place.take_further(int(scope["path"].rpartition("/")[2]) - 1, "n")
        except ApiError as error:
            await refuse(send, error)
            return
        await self.go_on.wait()
        await answer(send, 200, tenant_asking.get().encode(), "text/plain")


async def begun(http: httpx.AsyncClient, num_choices: int, key: str = "") -> "asyncio.Task[httpx.Response]":
    """A request as far as it comes by itself."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    asked = asyncio.create_task(http.post(f"/v1/{num_choices}", headers=headers))
    for _ in range(100):
        await asyncio.sleep(0)
    return asked


async def test_the_queue_counts_sequences_and_requests_of_one_always_find_their_places() -> None:
    app = Held()
    async with client(BoundedQueue(app, 10)) as http:
        never = await (await begun(http, 12))
        assert never.status_code == 400
        assert never.json()["error"]["param"] == "n"
        assert "11 at most" in never.json()["error"]["message"]
        running = [await begun(http, 11)]
        full = await (await begun(http, 2))
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        running += [await begun(http, 1) for _ in range(9)]
        assert not any(task.done() for task in running)
        assert (await (await begun(http, 1))).status_code == 429
        running[0].cancel()
        await asyncio.wait(running[:1])
        running[0] = await begun(http, 5)
        assert not running[0].done(), "places are given back"
        app.go_on.set()
        assert [reply.status_code for reply in await asyncio.gather(*running)] == [200] * 10
        everything_again = await http.post("/v1/11")
        assert everything_again.status_code == 200


async def test_a_key_that_fills_the_queue_leaves_others_their_share() -> None:
    app = Held()
    async with client(ApiKeys(BoundedQueue(app, 10, num_tenants=2), ["one", "two"])) as http:
        running = [await begun(http, 1, "one") for _ in range(9)] + [await begun(http, 11, "one")]
        assert (await (await begun(http, 1, "one"))).status_code == 429
        others = [await begun(http, 1, "two") for _ in range(4)] + [await begun(http, 6, "two")]
        assert not any(task.done() for task in (*running, *others))
        assert (await (await begun(http, 1, "two"))).status_code == 429
        app.go_on.set()
        assert {reply.text for reply in await asyncio.gather(*running)} == {"key 0"}
        assert {reply.text for reply in await asyncio.gather(*others)} == {"key 1"}


class Recording(LocalEngine):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[EngineRequest] = []

    def send(self, message: RequestMessage) -> None:
        if isinstance(message, Submit):
            self.asked += message.requests
        super().send(message)


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_is_told_whose_key_it_was_and_what_was_asked_for_together(stream: bool) -> None:
    engine = Recording()
    llm = AsyncClient(engine, FrontEnd(None, ModelLimits(max_model_len=256, vocab_size=50, eos_token_ids=frozenset())))
    app = BoundedQueue(make_app(ServedModel(llm, "toy", 256, created=0)), 10, num_tenants=2)
    body = {"prompt": [[1, 2], [3, 4]], "n": 2, "max_tokens": 3, "stream": stream}
    async with client(ApiKeys(app, ["one", "two"])) as http:
        for key in ("two", "one", "two"):
            reply = await http.post("/v1/completions", json=body, headers={"authorization": f"Bearer {key}"})
            assert reply.status_code == 200
        full = await http.post("/v1/completions", json=body | {"n": 6}, headers={"authorization": "Bearer one"})
        assert full.status_code == 400
        assert full.json()["error"]["param"] == "n"
    llm.close()
    assert [request.tenant for request in engine.asked] == ["key 1"] * 2 + ["key 0"] * 2 + ["key 1"] * 2
    groups = [request.group for request in engine.asked]
    assert groups[0::2] == groups[1::2]
    assert len(set(groups)) == 3


async def test_what_does_not_generate_never_queues() -> None:
    async with client(BoundedQueue(length_of_body, 0)) as http:
        assert (await http.get("/v1/models")).status_code == 200
        assert (await http.get("/version")).status_code == 200
        for path in ("/v1/completions", "/tokenize", "/detokenize"):
            assert (await http.post(path)).status_code == 429


async def test_the_queue_knows_its_paths_below_a_mount() -> None:
    transport = httpx.ASGITransport(BoundedQueue(length_of_body, 0), root_path="/llm")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.post("/llm/v1/completions")).status_code == 429


async def test_an_id_goes_in_comes_back_and_stands_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eagleray")
    async with client(RequestIds(length_of_body, reply=True)) as http:
        reply = await http.post("/a%0Ab", headers={"X-Request-Id": "a.b-C_1"})
        assert reply.headers["x-request-id"] == reply.headers["request-id-seen"] == "a.b-C_1"
        made = await http.get("/" + "x" * 50_000)
        assert made.headers["x-request-id"] == made.headers["request-id-seen"] != "a.b-C_1"
    first, second = (record.getMessage() for record in caplog.records if record.name.startswith("eagleray"))
    assert re.match(r"request a\.b-C_1: POST '/a\\nb' 200 in [\d.]+", first)
    assert made.headers["x-request-id"] in second
    assert len(second) < 200


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "a;b", "ü".encode()])
async def test_an_id_that_does_not_belong_in_a_log_is_refused(bad: str | bytes) -> None:
    async with client(RequestIds(length_of_body, reply=True)) as http:
        reply = await http.get("/", headers=[(b"x-request-id", bad if isinstance(bad, bytes) else bad.encode())])
    assert reply.status_code == 400
    assert json.loads(reply.text)["error"]["code"] == "invalid_request_id"


async def test_health_tells_what_the_check_says() -> None:
    def dead() -> None:
        raise EngineDeadError("rank 1: its process is gone")

    for check, status in ((lambda: None, 200), (dead, 503)):
        async with client(Health(Figures(length_of_body, lambda: b"a 1\n"), check)) as http:
            reply = await http.get("/health")
            assert reply.status_code == status
            assert ("rank 1" in reply.text) == (status == 503)
            assert (await http.get("/metrics")).text == "a 1\n"
            assert (await http.post("/health")).text == "0"  # the application's
            pings = [await http.get("/ping"), await http.post("/ping")]
            assert [ping.status_code for ping in pings] == [status] * 2


PREFLIGHT = {
    "origin": "https://app.example.com",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.mark.parametrize("origins", [["*"], ["https://app.example.com", "null"]])
async def test_a_page_of_an_allowed_origin_can_ask_and_read_even_what_is_refused(origins: list[str]) -> None:
    app = RequestIds(ApiKeys(BoundedQueue(BodyLimit(length_of_body, 5), 0), ["one"]), reply=True)
    shown = {"access-control-allow-origin": "*" if origins == ["*"] else "https://app.example.com"}
    async with client(cross_origin(app, origins)) as http:
        preflight = await http.options("/v1/completions", headers=PREFLIGHT)
        assert preflight.status_code == 200  # without a key
        assert shown.items() <= preflight.headers.items()
        assert "POST" in preflight.headers["access-control-allow-methods"]
        assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
        asked = {"origin": "https://app.example.com", "authorization": "Bearer one"}
        for path, body, changes, status in (
            ("/version", b"abc", {}, 200),
            ("/version", b"abc", {"authorization": "Bearer two"}, 401),
            ("/version", b"abcdef", {}, 413),
            ("/v1/completions", b"abc", {}, 429),
            ("/version", b"abc", {"x-request-id": "not one"}, 400),
        ):
            answered = await http.post(path, content=body, headers=asked | changes)
            assert answered.status_code == status
            assert shown.items() <= answered.headers.items()
            assert answered.headers["access-control-expose-headers"] == "x-request-id, retry-after"
            assert "access-control-allow-credentials" not in answered.headers


async def test_a_page_of_another_origin_cannot_and_others_see_no_difference() -> None:
    app = ApiKeys(length_of_body, ["one"])
    for origins in (["https://other.example.com"], ["http://app.example.com"], []):
        async with client(cross_origin(app, origins)) as http:
            preflight = await http.options("/v1/completions", headers=PREFLIGHT)
            assert preflight.status_code in (400, 401)
            answered = await http.post("/", headers={"origin": PREFLIGHT["origin"], "authorization": "Bearer one"})
            assert answered.status_code == 200
            for reply in (preflight, answered, await http.post("/")):
                assert "access-control-allow-origin" not in reply.headers


async def test_a_stream_reaches_a_page_piece_by_piece() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def stream(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(3):
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            assert len(sent) == 2 + number
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Any:
        raise AssertionError("nothing is to be read")

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"origin", b"https://app.example.com")]}
    await cross_origin(stream, ["*"])(scope, receive, send)
    assert (b"access-control-allow-origin", b"*") in sent[0]["headers"]
    assert len(sent) == 5


def test_only_requests_take_a_place() -> None:
    assert not may_generate({"type": "lifespan"})
    assert not may_generate({"type": "websocket", "path": "/v1/completions"})
    assert not may_generate({"type": "http", "method": "GET", "path": "/tokenize"})
    assert may_generate({"type": "http", "method": "POST", "path": "/tokenize"})
