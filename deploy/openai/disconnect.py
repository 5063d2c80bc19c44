"""Cancels work when its client disconnects."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from eagleray.deploy.openai.errors import ApiError

T = TypeVar("T")

CLIENT_GONE = 499  # nginx's status for it; nobody is there to see it but the log


class ClientGoneError(ApiError):
    """The client closed the connection before it had its answer."""

    def __init__(self) -> None:
        super().__init__(CLIENT_GONE, "the client closed the connection")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns. If the client goes away first, it is cancelled, and `ClientGoneError` raised.

    `receive` is ASGI's, with the request's body read already: then the next message says that the client is gone.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
