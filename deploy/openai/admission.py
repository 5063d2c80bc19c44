"""Who gets in: API keys, a limit on bodies, a bounded queue. Pure ASGI, so that streams pass through untouched."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.cluster.words import counted
from eagleray.deploy.api_keys import key_digest
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.refusal import refuse

RETRY_AFTER_S = 1  # a queue that is full moves on within a few steps


class ApiKeys:
    """401 without one of `keys` as bearer token, or one that has one of `digests`. None at all lets everybody in.

    Only digests are kept and compared, each in constant time, and none is ever logged.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], digests: Sequence[bytes] = ()) -> None:
        self._app = app
        self._digests = [*digests, *map(key_digest, keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests or self._knows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            message = "there is no valid API key; send one as `Authorization: Bearer KEY`"
            error = ApiError(401, message, code="invalid_api_key")
            await refuse(send, error, {"www-authenticate": "Bearer"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _knows(self, scope: Scope) -> bool:
        scheme, _, token = _header(scope, b"authorization").partition(b" ")
        given = key_digest(token.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever matches
        return any(matches) and scheme.lower() == b"bearer"


class BodyLimit:
    """413 for a body over `max_bytes`, whether it says so or grows beyond. What passes is handed on as one piece."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = _header(scope, b"content-length")
        body = None
        if not (announced.isdigit() and int(announced) > self._max_bytes):
            body = await self._read(receive)
        if body is None:
            message = f"the body is longer than {self._max_bytes} bytes; send less, or raise max_body_bytes"
            await refuse(send, ApiError(413, message, code="body_too_large"), {"connection": "close"})
        else:
            await self._app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[Message] | None:
        """The whole body as one message, with the disconnection that cut it, if any; None if it is too long."""
        chunks, length = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return [message]
            chunks.append(message.get("body", b""))
            length += len(chunks[-1])
            if length > self._max_bytes:
                return None
            if not message.get("more_body", False):
                return [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]


class BoundedQueue:
    """429 with Retry-After for the request that would be one more than `max_requests` at once.

    Counted are those that may generate, from when their body is there to the last byte of the answer.
    """

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self.num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not may_generate(scope):
            await self._app(scope, receive, send)
        elif self.num_requests >= self._max_requests:
            message = f"{counted(self.num_requests, 'request')} in progress or waiting here already; retry in a while"
            error = ApiError(429, message, "rate_limit_error", code="queue_full")
            await refuse(send, error, {"retry-after": str(RETRY_AFTER_S)})
        else:
            self.num_requests += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self.num_requests -= 1


def route_path(scope: Scope) -> str:
    """The path below wherever the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def may_generate(scope: Scope) -> bool:
    """Whether a request is one of those that the engine is asked for."""
    return scope["type"] == "http" and scope["method"] == "POST" and route_path(scope).startswith("/v1/")


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed


def _header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name, in lower case as ASGI has it; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")
