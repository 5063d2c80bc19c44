"""An answer without the application: an error in OpenAI's shape, from pure ASGI."""

import json
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import Send

NONE: Mapping[str, str] = MappingProxyType({})


async def refuse(
    send: Send, status: int, message: str, kind: str, code: str | None, headers: Mapping[str, str] = NONE
) -> None:
    """Send an error as the whole answer."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    await answer(send, status, json.dumps({"error": error}).encode(), "application/json", headers)


async def answer(send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str] = NONE) -> None:
    """Send a whole answer."""
    lines = {"content-type": content_type, "content-length": str(len(body))} | dict(headers)
    encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
