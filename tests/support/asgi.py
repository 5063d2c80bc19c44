"""Applications of one function, and a client for them without a server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.deploy.openai.middleware.respond import answer


async def length_of_body(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with how long the body was."""
    length, more = 0, True
    while more:
        message = await receive()
        length += len(message["body"])
        more = message["more_body"]
    seen = scope.get("state", {}).get("request_id", "-")
    await answer(send, 200, str(length).encode(), "text/plain", {"request-id-seen": seen})


@asynccontextmanager
async def client(app: ASGIApp) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as made:
        yield made
