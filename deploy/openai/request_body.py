"""Reads request bodies, from bytes to JSON values, large ones in a thread together with their validation.

Others are served meanwhile but for what C and Rust do at one go: JSON's parser, and pydantic with one list.
"""

import asyncio
import json
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.types import Receive, Scope

from eagleray.deploy.openai.error_handlers import validation_error
from eagleray.deploy.openai.errors import ApiError, BodyError
from eagleray.deploy.openai.limits import check_bytes, check_shape, too_deep
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.openai.truncate import MAX_SHOWN, truncate

if TYPE_CHECKING:
    from fastapi._compat import ModelField  # private: what a route's `body_field` is

LARGE = 64 * 1024  # bytes: beyond it a thread reads
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how compressed bodies begin
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
Check = Callable[[dict[str, Any]], None]
Read = Callable[[bytes, str | None], Coroutine[Any, Any, Any]]


def body_route(served: ServedModel, *, generates: bool) -> type[APIRoute]:
    """A kind of route whose bodies are read here; those that generate have prompts that must fit the model."""
    check = served.limits.check_prompts if generates else served.limits.check_tokens

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Handler:
            handler = super().get_route_handler()
            read = partial(_read, check, self.body_field)

            async def handle(request: Request) -> Response:
                return await handler(ReadRequest(request.scope, request.receive, read))

            return handle

    return BodyRoute


class ReadRequest(Request):
    """One whose JSON `read` makes of the body and its encoding."""

    def __init__(self, scope: Scope, receive: Receive, read: Read) -> None:
        super().__init__(scope, receive)
        self._read = read

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = await self._read(await self.body(), self.headers.get("content-encoding"))
        return self._json


async def _read(check: Check | None, field: "ModelField | None", body: bytes, encoding: str | None) -> Any:
    """JSON's values, or the route's model for them, which FastAPI takes as it is, where a thread is needed anyway."""
    try:
        if len(body) <= LARGE:
            return parse(body, encoding, check)
        return await asyncio.to_thread(_validated, check, field, body, encoding)
    except ApiError as error:
        raise BodyError(error) from error


def _validated(check: Check | None, field: "ModelField | None", body: bytes, encoding: str | None) -> Any:
    value = parse(body, encoding, check)
    if field is None:
        return value
    model, errors = field.validate(value, {}, loc=("body",))
    if errors:
        raise validation_error(errors, field)
    return model


def parse(body: bytes, encoding: str | None = None, check: Check | None = None) -> Any:
    """JSON's values. Raises `ApiError` 400 for what is too much or no text, and `json.JSONDecodeError`."""
    if (encoding or "identity") != "identity" or body.startswith((GZIP, ZSTD)):
        said = f" (content-encoding: {truncate(encoding, MAX_SHOWN)})" if encoding else ""
        raise ApiError(400, f"the body is compressed{said}; send plain JSON, without content-encoding")
    check_bytes(body)
    try:
        value = json.loads(body)
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}; send UTF-8") from error
    except RecursionError as error:
        raise too_deep() from error
    except ValueError as error:  # of an integer with thousands of digits
        raise ApiError(400, "the body holds a number with too many digits; send shorter numbers") from error
    if check is not None and isinstance(value, dict):
        check(value)
    check_shape(value)
    return value
