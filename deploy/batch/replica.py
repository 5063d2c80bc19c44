"""Answers batch rows with the server's own code, by calling the HTTP app in this process."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp

from eagleray.cluster.errors import EngineDeadError
from eagleray.deploy.batch.rows import Answer
from eagleray.deploy.openai.request_context import row_seed

HEADERS = [(b"content-type", b"application/json")]
SERVER = ("batch", 80)


class AppReplica:
    """Rows as requests to an app."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def answer(self, url: str, body: bytes, seed: int | None = None) -> Answer:
        """What a client of the server would get. Raises `EngineDeadError` if the engine is gone.

        A request without a seed draws by this one, or else by the engine's.
        """
        exchange = _Exchange(body)
        token = row_seed.set(seed)
        try:
            await self._app(exchange.scope(url), exchange.receive, exchange.send)
        except EngineDeadError:
            raise
        except Exception:  # raised again, for logs, after the answer that says so
            if not exchange.whole:
                raise
        finally:
            row_seed.reset(token)
        if exchange.status == 503:
            raise EngineDeadError(exchange.body.decode(errors="replace"))
        return Answer(exchange.status, bytes(exchange.body))


class _Exchange:
    """One request and its response, as ASGI 3 has them (https://asgi.readthedocs.io/en/latest/specs/www.html)."""

    def __init__(self, body: bytes) -> None:
        self._requests = [{"type": "http.request", "body": body, "more_body": False}]
        self.status = 0
        self.body = bytearray()
        self.whole = False

    def scope(self, url: str) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": url,
            "raw_path": url.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": HEADERS,
            "client": None,
            "server": SERVER,
        }

    async def receive(self) -> MutableMapping[str, Any]:
        if self._requests:
            return self._requests.pop()
        await asyncio.Event().wait()  # this client never goes away
        raise AssertionError

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
            self.whole = not message.get("more_body", False)
