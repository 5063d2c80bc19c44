"""Turns exceptions and validation errors into OpenAI's error responses."""

import json
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from eagleray.cluster.errors import EngineDeadError, counted
from eagleray.deploy.openai.errors import ApiError, BodyError, as_api_error
from eagleray.deploy.openai.requests import CHAT_TAG, TEXT_TAG, absent_in
from eagleray.deploy.openai.truncate import MAX_SHOWN, excerpt, truncate
from eagleray.deploy.openai.unsupported_fields import IN_CHATS, IN_COMPLETIONS

if TYPE_CHECKING:
    from fastapi._compat import ModelField  # private: what a route's `body_field` is

KNOWN_ABSENT = IN_COMPLETIONS | IN_CHATS  # what is lacking is the same everywhere
MAX_NAMED = 20  # unknown fields in a message


def install_handlers(app: FastAPI) -> None:
    """Every failure of a route becomes an `ErrorReply`."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ApiError, _other)
    app.add_exception_handler(EngineDeadError, _other)
    app.add_exception_handler(Exception, _other)  # after which Starlette raises it again, for the server to log


def error_response(error: ApiError) -> Response:
    """ASCII throughout: a message may repeat what is not valid Unicode."""
    body = json.dumps(error.reply().model_dump(), ensure_ascii=True)
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return Response(body, error.status, headers, "application/json")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors(), getattr(request.scope.get("route"), "body_field", None)))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyError):
        return error_response(error.error)
    response = error_response(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _other(_: Request, error: Exception) -> Response:
    return error_response(as_api_error(error))


def validation_error(errors: Sequence[Any], field: "ModelField | None") -> ApiError:
    """pydantic's findings as one message about the first field that is wrong, in words that name it.

    `field` is the route's body, whose model says which values it takes of a field that is not supported.
    """
    first = errors[0]
    path = _path(first)
    match first["type"]:
        case "json_invalid":
            return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        case "extra_forbidden" if (absent := KNOWN_ABSENT.get(path)) is not None:
            accepted = {} if field is None else absent_in(field.field_info.annotation)
            neutral = " or ".join(map(json.dumps, absent.neutral if path in accepted else ()))
            others = f", or give {neutral}" if neutral else ""
            wanted = f"leave it out{others}"
            return ApiError(400, f"{path} is {excerpt(first.get('input'))}, but {absent.lack}; {wanted}", param=path)
        case "extra_forbidden":
            return _unknown_fields([_path(error) for error in errors if error["type"] == "extra_forbidden"])
        case "string_unicode" if not path:
            name = excerpt(first.get("input"))
            return ApiError(400, f"the name of a field, {name}, holds what is not a character; give UTF-8 text")
        case "missing" if path:
            return ApiError(400, f"{path} is missing; it is required", param=path)
    if not path:
        return ApiError(400, "the body must be a JSON object, sent with content-type: application/json")
    if (kind := _kind_of_part(errors)) is not None:
        return ApiError(400, f"{path} has a part of type {kind}; only parts of type text are supported", param=path)
    ways = dict.fromkeys(_wanted(error) for error in errors if _path(error) == path)  # one for each type it may have
    return ApiError(400, f"{path} is {excerpt(first.get('input'))}; {' or '.join(ways)}", param=path)


def _unknown_fields(names: Sequence[str]) -> ApiError:
    named = ", ".join(dict.fromkeys(names[:MAX_NAMED]))
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    ending = "is a field that this server does not have; leave it out"
    if len(names) > 1:
        ending = "are fields that this server does not have; leave them out"
    return ApiError(400, f"{named}{more} {ending}", param=names[0])


def _path(error: Any) -> str:
    """Where in the body, as "messages.0.role", without pydantic's names of the types that were tried."""
    names = [truncate(str(part), MAX_SHOWN) for part in error["loc"] if part not in ("body", TEXT_TAG, CHAT_TAG)]
    return ".".join(takewhile(lambda name: name != "str" and "[" not in name, names))


def _wanted(error: Any) -> str:
    if error["type"] == "too_short":  # pydantic's words are of a list "after validation"
        return f"give at least {counted(error['ctx']['min_length'], 'item')}"
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def _kind_of_part(errors: Sequence[Any]) -> str | None:
    """What stands for the type of a message's part that is not text."""
    wrong = (error for error in errors if error["type"] == "literal_error" and error["loc"][-1] == "type")
    return next((excerpt(error.get("input")) for error in wrong if error.get("input") not in ("text", "refusal")), None)
