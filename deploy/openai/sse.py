"""Sends an answer as server-sent events."""

import json
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from eagleray.deploy.openai.disconnect import CLIENT_GONE, ClientGoneError, while_connected
from eagleray.deploy.openai.errors import as_api_error
from eagleray.deploy.openai.event_template import event

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
FULL = 64 * 1024  # bytes of events that are sent at once, or more if one is larger


class EventStream(Response):
    """Sends the events of chunks as soon as they are there, and closes the chunks when the client goes away.

    Chunks that come together go out together: a write each would cost the server more than their making. One that is
    bytes is an event already.

    Whatever fails before the first chunk is an answer with its own status code; later it is an event `error`, the last.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[Sequence[BaseModel | bytes], None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._chunks = chunks
        self._begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(send))
        except ClientGoneError:
            if not self._begun:
                await Response(status_code=CLIENT_GONE)(scope, receive, send)

    async def _run(self, send: Send) -> None:
        async with aclosing(self._chunks) as chunks:
            first = await anext(chunks)
            self._begun = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                for body in _bodies(first):
                    await _send(send, body)
                async for chunk in chunks:
                    for body in _bodies(chunk):
                        await _send(send, body)
            except Exception as error:
                told = as_api_error(error)
                if told is not error and told.status == 500:  # not foreseen
                    logger.error("A stream failed", exc_info=error)
                else:
                    logger.error("a stream ends early: %s", told)
                last = f"event: error\ndata: {json.dumps(told.reply().model_dump())}\n\n"
                await _send(send, last.encode(), more=False)
                return
            await _send(send, DONE, more=False)


def _bodies(chunks: Sequence[BaseModel | bytes]) -> Iterator[bytes]:
    """The events of chunks, many in one."""
    body = bytearray()
    for chunk in chunks:
        body += chunk if isinstance(chunk, bytes) else event(chunk)
        if len(body) >= FULL:
            yield bytes(body)
            body.clear()
    if body:
        yield bytes(body)


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
