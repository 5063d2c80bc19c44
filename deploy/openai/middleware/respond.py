"""Sends a response from pure ASGI, without the application."""

from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import Send

from eagleray.deploy.openai.errors import ApiError

NONE: Mapping[str, str] = MappingProxyType({})


async def refuse(send: Send, error: ApiError, headers: Mapping[str, str] = NONE) -> None:
    """Send an error as the whole answer."""
    body = error.reply().model_dump_json().encode()
    await answer(send, error.status, body, "application/json", headers)


async def answer(send: Send, status: int, body: bytes, content_type: str, headers: Mapping[str, str] = NONE) -> None:
    """Send a whole answer."""
    lines = {"content-type": content_type, "content-length": str(len(body))} | dict(headers)
    encoded = [(name.encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})
