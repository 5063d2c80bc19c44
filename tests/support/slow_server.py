"""A server that streams answers with known delays, and keeps what it was asked and when it sent each token."""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Receive, Scope, Send


@dataclass
class Seen:
    """One request, in the order of arrival; times on the clock of `time.monotonic()`."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    sent: list[float] = field(default_factory=list)  # just before each token


@dataclass
class SlowServer:
    """An ASGI app. Answers have `max_tokens` tokens; `refused` are statuses by number of arrival."""

    first_s: float
    next_s: float
    refused: dict[int, int] = field(default_factory=dict)
    cut: int | None = None  # the number of the request whose stream ends after its first token
    models: list[str] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["path"] == "/v1/models":
            listed = {"object": "list", "data": [{"id": name} for name in self.models]}
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(listed).encode()})
            return
        number = len(self.seen)
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        seen = Seen(scope["path"], headers, json.loads(body))
        self.seen.append(seen)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if number in self.refused:
            await send({"type": "http.response.start", "status": self.refused[number], "headers": []})
            await send({"type": "http.response.body", "body": b'{"error": {"message": "not now"}}'})
        else:
            await self._stream(send, seen, cut=number == self.cut)
        self.running -= 1

    async def _stream(self, send: Send, seen: Seen, *, cut: bool) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for index in range(1 if cut else seen.body["max_tokens"]):
            await asyncio.sleep(self.next_s if index else self.first_s)
            seen.sent.append(time.monotonic())
            chat = "messages" in seen.body
            await self._event(send, {"choices": [{"delta": {"content": "a"}} if chat else {"text": "a"}]})
        if not cut:
            prompt = seen.body.get("prompt") or seen.body["messages"][0]["content"].split()
            usage = {"prompt_tokens": len(prompt), "completion_tokens": seen.body["max_tokens"]}
            await self._event(send, {"choices": [], "usage": usage})
            await send({"type": "http.response.body", "body": b"data: [DONE]\r\n\r\n", "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _event(self, send: Send, event: dict[str, Any]) -> None:
        """In two halves, as a network might cut it."""
        data = f"data: {json.dumps(event)}\n\n".encode()
        for half in (data[:9], data[9:]):
            await send({"type": "http.response.body", "body": half, "more_body": True})
