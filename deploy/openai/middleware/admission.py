"""Middleware that decides who gets in: API keys, a bounded queue. Pure ASGI, so that streams pass through untouched."""

import hmac
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.cluster.errors import counted
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.middleware.api_keys import key_digest
from eagleray.deploy.openai.middleware.respond import refuse
from eagleray.deploy.openai.request_context import RETRY_AFTER_S, Place, Places, place_taken, queue_full, tenant_asking

TOKENS = ("/tokenize", "/detokenize")


class ApiKeys:
    """401 without one of `keys` as bearer token, or one that has one of `digests`. Without any, everybody is let in.

    Only digests are kept and compared, each in constant time, and none is ever logged. Further in it is known which key
    it was: each is a tenant, and all share the engine fairly.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], digests: Sequence[bytes] = ()) -> None:
        self._app = app
        self._digests = [*digests, *map(key_digest, keys)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests:
            await self._app(scope, receive, send)
        elif (number := self._number(scope)) is not None:
            token = tenant_asking.set(f"key {number}")
            try:
                await self._app(scope, receive, send)
            finally:
                tenant_asking.reset(token)
        elif scope["type"] == "http":
            message = "there is no valid API key; send one as `Authorization: Bearer KEY`"
            error = ApiError(401, message, code="invalid_api_key")
            await refuse(send, error, {"www-authenticate": "Bearer"})
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _number(self, scope: Scope) -> int | None:
        """Which of the keys the request came with."""
        scheme, _, token = header(scope, b"authorization").partition(b" ")
        given = key_digest(token.strip())
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]  # all of them, whichever matches
        return matches.index(True) if any(matches) and scheme.lower() == b"bearer" else None


class BoundedQueue:
    """429 with Retry-After for what would be more than `max_sequences` at once.

    Counted are sequences of those that may generate, from when their body is there to the last byte of the answer: a
    request's first among as many places as there are, its further choices among as many others. So one of thousands
    keeps others like it out, but none of those that want one answer.
    """

    def __init__(self, app: ASGIApp, max_sequences: int, num_tenants: int = 1) -> None:
        self._app = app
        self._first = Places(max_sequences, num_tenants)
        self._further = Places(max_sequences, num_tenants)

    @property
    def num_requests(self) -> int:
        """Those that are here."""
        return self._first.num_taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenant = tenant_asking.get()
        if not may_generate(scope):
            await self._app(scope, receive, send)
        elif not self._first.reserve(tenant, 1):
            message = f"{counted(self.num_requests, 'request')} in progress or waiting here already; retry in a while"
            await refuse(send, queue_full(message), {"retry-after": str(RETRY_AFTER_S)})
        else:
            place = Place(self._further, tenant)
            token = place_taken.set(place)
            try:
                await self._app(scope, receive, send)
            finally:
                place_taken.reset(token)
                place.leave()
                self._first.give_back(tenant, 1)


def route_path(scope: Scope) -> str:
    """The path below wherever the application is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def may_generate(scope: Scope) -> bool:
    """Whether a request is one of those that the engine or its tokenizer is asked for, which take their time."""
    if scope["type"] != "http" or scope["method"] != "POST":  # a lifespan has no path
        return False
    path = route_path(scope)
    return path.startswith("/v1/") or path in TOKENS


def header(scope: Scope, name: bytes) -> bytes:
    """The first header of this name, in lower case as ASGI has it; empty if there is none."""
    return next((value for key, value in scope["headers"] if key == name), b"")
