"""API errors in OpenAI's shape, with their status codes."""

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from eagleray.cluster.errors import ContextLengthError, EngineClosedError, EngineDeadError
from eagleray.cluster.options import NULL, OptionError
from eagleray.deploy.openai.truncate import MAX_WORDS, truncate


class ErrorDetail(BaseModel):
    message: str = Field(description="What is wrong, and what to do about it.")
    type: str = Field(description="`invalid_request_error` is the client's to fix, `server_error` is not.")
    param: str | None = Field(description="The field of the request, where one is to blame.")
    code: str | None = Field(description="A name for programs, where the status code does not say it all.")


class ErrorReply(BaseModel):
    """Every failure has this form; in a stream it is the last event."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 200."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    def reply(self) -> ErrorReply:
        """The body of the answer."""
        return ErrorReply(error=ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code))


class BodyError(HTTPException):
    """An `ApiError` on its way through FastAPI, which lets no other exception of a body pass."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.status, error.message)
        self.error = error


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an exception: of an unexpected one only its type, so log that one."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineClosedError):
        return ApiError(
            503, "this server is shutting down; try again, or use another one", "server_error", code="engine_closed"
        )
    if isinstance(error, EngineDeadError):
        return ApiError(503, f"the engine is gone: {error}; try again later", "server_error", code="engine_dead")
    return ApiError(
        500, f"the server failed with {type(error).__name__}; its log says more", "server_error", code="internal_error"
    )


@contextmanager
def bad_requests(fields: frozenset[str] = frozenset()) -> Iterator[None]:
    """Inside, a `ValueError` is the client's: status 400, and the field, if the message begins with one of `fields`."""
    try:
        yield
    except ValueError as error:
        message = truncate(error.words(NULL) if isinstance(error, OptionError) else str(error), MAX_WORDS)
        if isinstance(error, ContextLengthError):
            raise too_long(message) from error
        name = message.partition(" ")[0]
        raise ApiError(400, message, param=name if name in fields else None) from error


def too_long(message: str) -> ApiError:
    """What clients know as a reason to shorten a conversation."""
    return ApiError(400, message, code="context_length_exceeded")
