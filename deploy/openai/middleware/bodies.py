"""Middleware that reads bodies whole before anything else sees them, in bounded memory and time. Pure ASGI."""

import asyncio
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray.cluster.errors import counted
from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.limits import MAX_CHARACTERS
from eagleray.deploy.openai.middleware.admission import TOKENS, header, route_path
from eagleray.deploy.openai.middleware.respond import refuse
from eagleray.deploy.openai.request_context import RETRY_AFTER_S

MAX_COUNTED_BYTES = 6 * MAX_CHARACTERS  # JSON may write a character so
LARGEST_AT_ONCE = 8  # of the largest bodies, as many bytes may be here of all that are not complete
GRACE_S, BYTES_PER_S = 30.0, 16_384  # within which a body has come: 16 MiB within 18 minutes


class BodyLimit:
    """Refuses a body over `max_bytes` with 413, whether it says so or grows beyond; what passes is handed on whole.

    Too slow a one gets 408. Where those that are on their way take too many bytes together, the largest gets 429, so
    that nobody whose own is small notices. What only asks the tokenizer has fewer bytes, since JSON's parser lets no
    others go on meanwhile.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._coming: dict[_Body, None] = {}  # in order of arrival
        self._num_bytes = 0  # that have come of these

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header(scope, b"content-length")
        max_bytes, remedy = self._max_bytes, "send less, or raise max_body_bytes"
        if route_path(scope) in TOKENS and max_bytes > MAX_COUNTED_BYTES:
            max_bytes, remedy = MAX_COUNTED_BYTES, "send less at once"
        body = _Body()
        try:
            if announced.isdigit() and int(announced) > max_bytes:
                raise _TooLongError
            messages = await self._read(receive, body, max_bytes)
        except _TooLongError:
            message = f"the body is longer than {max_bytes} bytes; {remedy}"
            await refuse(send, ApiError(413, message, code="body_too_large"), {"connection": "close"})
        except TimeoutError:
            again = {"retry-after": str(RETRY_AFTER_S)} if body.gives_way else {}
            error = body.too_many() if body.gives_way else body.too_slow()
            await refuse(send, error, {"connection": "close"} | again)
        else:
            await self._app(scope, _replay(messages, receive), send)

    async def _read(self, receive: Receive, body: "_Body", max_bytes: int) -> list[Message]:
        """The whole body as one message, or the disconnection that cut it.

        Raises `_TooLongError`, or `TimeoutError` if it takes too long or has to give way.
        """
        begin = asyncio.get_running_loop().time()
        self._coming[body] = None
        async with asyncio.timeout_at(begin + GRACE_S) as body.timeout:
            try:
                while True:
                    message = await receive()
                    if body.gives_way or body.timeout.expired():
                        await asyncio.Event().wait()  # for the timeout, which is due
                    if message["type"] == "http.disconnect":
                        return [message]
                    piece = message.get("body", b"")
                    body.come += piece
                    self._num_bytes += len(piece)
                    if len(body.come) > max_bytes:
                        raise _TooLongError
                    if not message.get("more_body", False):
                        return [{"type": "http.request", "body": bytes(body.come), "more_body": False}]
                    body.timeout.reschedule(begin + GRACE_S + len(body.come) / BYTES_PER_S)
                    self._make_way()
            finally:
                self._forget(body)

    def _make_way(self) -> None:
        """The largest body, the oldest of several, goes as long as all together are too large."""
        while self._num_bytes > LARGEST_AT_ONCE * self._max_bytes:
            largest = max(self._coming, key=lambda body: len(body.come))
            largest.gives_way = True
            self._forget(largest)
            assert largest.timeout is not None
            largest.timeout.reschedule(0)

    def _forget(self, body: "_Body") -> None:
        if body in self._coming:
            del self._coming[body]
            body.length = len(body.come)
            self._num_bytes -= body.length
            body.come = bytearray()


@dataclass(eq=False)
class _Body:
    """One that is on its way."""

    come: bytearray = field(default_factory=bytearray)  # one piece of memory, however small the pieces are
    timeout: asyncio.Timeout | None = None
    gives_way: bool = False
    length: int = 0  # bytes that had come when it was whole or given up

    def too_slow(self) -> ApiError:
        within = f"{GRACE_S:g} s and 1 s more for every {BYTES_PER_S} bytes"
        message = f"of the body {counted(self.length, 'byte')} came within {within}; send it at once"
        return ApiError(408, message, code="body_too_slow")

    def too_many(self) -> ApiError:
        message = (
            f"the bodies on their way to this server are too long together, and this one, {self.length} bytes so far, "
            "is the longest; retry in a while, or send less at once"
        )
        return ApiError(429, message, "rate_limit_error", code="bodies_too_large", retry_after_s=RETRY_AFTER_S)


class _TooLongError(Exception):
    """A body has more bytes than it may."""


def _replay(messages: list[Message], receive: Receive) -> Receive:
    async def replayed() -> Message:
        return messages.pop(0) if messages else await receive()

    return replayed
