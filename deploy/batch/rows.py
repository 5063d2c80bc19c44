"""Parses rows of OpenAI's batch files and writes their results."""

import re
import uuid
from dataclasses import dataclass

import msgspec

from eagleray.deploy.openai.truncate import excerpt

URLS = ("/v1/chat/completions", "/v1/completions")
ID = re.compile(r"batch_req_([1-9][0-9]*)")


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input that is not blank; lines are counted from 1."""

    number: int
    text: bytes
    duplicate_of: int | None = None  # the first line with this custom_id, if that is another


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a line must hold."""

    custom_id: str
    method: str
    url: str
    body: msgspec.Raw  # JSON, which the server's own code reads


class Answer(msgspec.Struct, frozen=True):
    """What a server would answer to a request: a status code of HTTP and a body of JSON."""

    status: int
    body: bytes


class RowError(ValueError):
    """A line is not a request that could be sent; `code` says why in a word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Named(msgspec.Struct):
    custom_id: str


class _Response(msgspec.Struct):
    status_code: int
    request_id: str
    body: msgspec.Raw


class _Fault(msgspec.Struct):
    code: str
    message: str


class _Result(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Response
    error: _Fault | None


class _Status(msgspec.Struct):
    status_code: int


class _Recorded(msgspec.Struct):
    id: str
    custom_id: str | None
    response: _Status


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Completion(msgspec.Struct):
    """The parts of a body that are looked at; not every body has them."""

    id: str | None = None
    usage: _Usage | None = None


class _Streams(msgspec.Struct):
    stream: bool = False


_named = msgspec.json.Decoder(_Named)
_row = msgspec.json.Decoder(Row)
_streams = msgspec.json.Decoder(_Streams)
_recorded = msgspec.json.Decoder(_Recorded)
_completion = msgspec.json.Decoder(_Completion)


def custom_id(text: bytes) -> str | None:
    """The custom_id of a line, or None if it has none that can be read."""
    try:
        return _named.decode(text).custom_id
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def parse(line: Line) -> Row:
    """The request of a line. Raises `RowError`."""
    try:
        row = _row.decode(line.text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        form = '{"custom_id": "…", "method": "POST", "url": "/v1/chat/completions", "body": {…}}'
        cause = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RowError("invalid_row", f"line {line.number} is not a row: {cause}; write it as {form}") from None
    if line.duplicate_of is not None:
        raise RowError(
            "duplicate_custom_id",
            f"line {line.number} has custom_id {excerpt(row.custom_id)}, as line {line.duplicate_of} has, which is "
            "answered; give every row an id of its own",
        )
    if row.method != "POST":
        raise RowError("invalid_method", f"line {line.number} has method {excerpt(row.method)}; give 'POST'")
    if row.url not in URLS:
        raise RowError("invalid_url", f"line {line.number} has url {excerpt(row.url)}; give one of {', '.join(URLS)}")
    if _wants_stream(row.body):
        raise RowError(
            "invalid_stream", f"line {line.number} has stream true, but a file holds no stream; leave it out"
        )
    return row


def result(line: Line, answer: Answer) -> bytes:
    """The output's line for a request that was answered, with an error or without."""
    known = _known(answer.body)
    response = _Response(answer.status, known.id or _request_id(), _on_one_line(answer.body))
    return _encode(_Result(f"batch_req_{line.number}", custom_id(line.text), response, None))


def refusal(line: Line, error: RowError) -> bytes:
    """The output's line for one that was never sent: status code 400, and the error in both places to look for it."""
    fault = {"message": str(error), "type": "invalid_request_error", "param": None, "code": error.code}
    response = _Response(400, _request_id(), msgspec.Raw(msgspec.json.encode({"error": fault})))
    name = custom_id(line.text)
    return _encode(_Result(f"batch_req_{line.number}", name, response, _Fault(error.code, str(error))))


def fatal(num_deaths: int, cause: str) -> Answer:
    """The answer to a request that ended this many engines while they ran nothing else."""
    message = f"{num_deaths} engines died while they ran this row and no other; the last cause: {cause}"
    error = {"message": message, "type": "server_error", "param": None, "code": "engine_died"}
    return Answer(500, msgspec.json.encode({"error": error}))


def recorded(text: bytes) -> tuple[int, str | None, bool]:
    """Line number, custom_id and success of a line of the output. Raises `ValueError` if it is not one of ours."""
    known = _recorded.decode(text)
    if (found := ID.fullmatch(known.id)) is None:
        raise ValueError(f"the id {excerpt(known.id)} is not a batch result id")
    return int(found[1]), known.custom_id, known.response.status_code == 200


def num_completion_tokens(answer: Answer) -> int:
    """As its usage says; 0 where it has none."""
    usage = _known(answer.body).usage
    return usage.completion_tokens if usage else 0


def _known(body: bytes) -> _Completion:
    try:
        return _completion.decode(body)
    except msgspec.MsgspecError:
        return _Completion()


def _wants_stream(body: msgspec.Raw) -> bool:
    try:
        return _streams.decode(body).stream
    except (msgspec.MsgspecError, RecursionError):
        return False  # the server's own code says what is wrong with it


def _on_one_line(body: bytes) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.format(body, indent=-1))


def _request_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def _encode(result: _Result) -> bytes:
    return msgspec.json.encode(result) + b"\n"
