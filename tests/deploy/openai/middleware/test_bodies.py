"""Bodies as pure ASGI: how long, how slow, and how many of them at once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from eagleray.deploy.openai.middleware import bodies
from eagleray.deploy.openai.middleware.bodies import LARGEST_AT_ONCE, MAX_COUNTED_BYTES, BodyLimit
from support.asgi import client, length_of_body


def pieces(count: int, size: int) -> Callable[[], AsyncIterator[bytes]]:
    async def body() -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * size

    return body


@pytest.mark.parametrize(("count", "status"), [(0, 200), (9, 200), (10, 200), (11, 413)])
async def test_bodies_up_to_the_limit_arrive_whole_however_they_are_sent(count: int, status: int) -> None:
    async with client(BodyLimit(length_of_body, 100)) as http:
        for content in (b"x" * 10 * count, pieces(count, 10)()):
            reply = await http.post("/", content=content)
            assert reply.status_code == status
            assert reply.text == str(10 * count) if status == 200 else reply.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_what_is_only_counted_has_fewer_bytes(path: str) -> None:
    async with client(BodyLimit(length_of_body, MAX_COUNTED_BYTES + 10)) as http:
        for size, target, status in (
            (MAX_COUNTED_BYTES, path, 200),
            (MAX_COUNTED_BYTES + 1, path, 413),
            (MAX_COUNTED_BYTES + 1, "/v1/completions", 200),
        ):
            assert (await http.post(target, content=b"x" * size)).status_code == status


async def test_an_endless_body_is_read_no_further_than_the_limit() -> None:
    num_read = 0

    async def receive() -> Any:
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"5")]}
    await BodyLimit(length_of_body, 100)(scope, receive, send)
    assert sent[0]["status"] == 413
    assert num_read == 11


class Client:
    """Sends a body piece by piece to an application, and hears what it answers."""

    def __init__(self, app: BodyLimit) -> None:
        self.sent: list[Any] = []
        self._pieces: asyncio.Queue[tuple[bytes, bool]] = asyncio.Queue()
        scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def send(self, piece: bytes, *, more: bool = True) -> None:
        """Returns once the application has it."""
        self._pieces.put_nowait((piece, more))
        while not self._pieces.empty() and not self._task.done():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def answer(self) -> tuple[int, bytes]:
        await self._task
        return self.sent[0]["status"], self.sent[1]["body"]

    async def _receive(self) -> Any:
        body, more = await self._pieces.get()
        return {"type": "http.request", "body": body, "more_body": more}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


async def test_the_largest_of_too_many_bodies_gives_way_and_no_small_one() -> None:
    app = BodyLimit(length_of_body, 100)
    clients = [Client(app) for _ in range(LARGEST_AT_ONCE + 1)]
    small = Client(app)
    await small.send(b"x")
    for each in clients[1:]:
        await each.send(b"x" * 90)
    await clients[0].send(b"x" * 79)  # one below what all may have: 8 * 90 + 79 + 1
    assert not any(each.sent for each in [*clients, small])
    await small.send(b"x")
    (status, message) = await clients[1].answer()
    assert (status, b"bodies_too_large" in message, b"90 bytes so far" in message) == (429, True, True)
    assert dict(clients[1].sent[0]["headers"])[b"retry-after"] == b"1"
    await small.send(b"x", more=False)
    assert await small.answer() == (200, b"3")
    for each in [clients[0], *clients[2:]]:
        await each.send(b"", more=False)
    assert [status for status, _ in [await each.answer() for each in [clients[0], *clients[2:]]]] == [200] * 8


async def test_a_body_that_has_come_or_gone_takes_no_room() -> None:
    app = BodyLimit(length_of_body, 100)
    for _ in range(3 * LARGEST_AT_ONCE):
        whole, too_long = Client(app), Client(app)
        for each in (whole, too_long):
            await each.send(b"x" * 90)
        await whole.send(b"x", more=False)
        await too_long.send(b"x" * 11)
        assert [(await each.answer())[0] for each in (whole, too_long)] == [200, 413]


async def test_a_body_that_does_not_come_in_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "GRACE_S", 0.0)
    slow = Client(BodyLimit(length_of_body, 100))
    status, message = await slow.answer()
    assert (status, b"of the body 0 bytes came within 0 s" in message) == (408, True)


async def test_what_has_come_of_a_body_gives_it_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte a minute: the second one comes in time, whatever the first instants are spent on."""
    monkeypatch.setattr(bodies, "BYTES_PER_S", 1 / 60)
    monkeypatch.setattr(bodies, "GRACE_S", 30.0)
    steady = Client(BodyLimit(length_of_body, 100))
    await steady.send(b"x")
    monkeypatch.setattr(bodies, "GRACE_S", -30.0)  # without what has come it would be too late
    await steady.send(b"x")
    await steady.send(b"x", more=False)
    assert await steady.answer() == (200, b"3")
