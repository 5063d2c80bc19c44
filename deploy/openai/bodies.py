"""Bodies of requests, from bytes to JSON's values: large ones in a thread, so that others are served meanwhile."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from eagleray.deploy.openai.errors import ApiError
from eagleray.deploy.openai.limits import check_bytes, check_shape, too_deep
from eagleray.deploy.openai.served import Served
from eagleray.deploy.openai.shown import MAX_SHOWN, cut

LARGE = 64 * 1024  # bytes: beyond it a thread reads
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how compressed bodies begin
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Check = Callable[[dict[str, Any]], None]


class BodyError(HTTPException):
    """An `ApiError` on its way through FastAPI, which lets no other exception of a body pass."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def body_route(served: Served, *, generates: bool) -> type[APIRoute]:
    """A kind of route whose bodies are read here; those that generate have prompts that must fit the model."""
    check = served.limits.check_prompts if generates else None

    class CheckedRequest(Request):
        async def json(self) -> Any:
            if not hasattr(self, "_json"):
                self._json = await _read(await self.body(), self.headers.get("content-encoding"), check)
            return self._json

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                return await handler(CheckedRequest(request.scope, request.receive))

            return handle

    return BodyRoute


async def _read(body: bytes, encoding: str | None, check: Check | None) -> Any:
    try:
        if len(body) <= LARGE:
            return parse(body, encoding, check)
        return await asyncio.to_thread(parse, body, encoding, check)
    except ApiError as error:
        raise BodyError(error) from error


def parse(body: bytes, encoding: str | None = None, check: Check | None = None) -> Any:
    """JSON's values. Raises `ApiError` 400 for what is too much or no text, and `json.JSONDecodeError`."""
    if (encoding or "identity") != "identity" or body.startswith((GZIP, ZSTD)):
        said = f" (content-encoding: {cut(encoding, MAX_SHOWN)})" if encoding else ""
        raise ApiError(400, f"the body is compressed{said}; send plain JSON, without content-encoding")
    check_bytes(body)
    try:
        value = json.loads(body)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is no UTF-8: {error.reason} at byte {error.start}; send UTF-8") from error
    except RecursionError as error:
        raise too_deep() from error
    except ValueError as error:  # of an integer with thousands of digits
        raise ApiError(400, "the body holds a number with too many digits; send shorter numbers") from error
    if check is not None and isinstance(value, dict):
        check(value)
    check_shape(value)
    return value
