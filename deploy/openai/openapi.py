"""Adds errors, events and API keys to the OpenAPI document."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from eagleray.deploy.openai.errors import ErrorReply

Responses = dict[int | str, dict[str, Any]]

RETRY_AFTER = {"Retry-After": {"description": "Seconds.", "schema": {"type": "string"}}}
FAILURES: dict[int, dict[str, Any]] = {  # whose limits are the server's, and so not those of every app
    400: {"description": "The request cannot be served as it is; `param` names the field."},
    401: {"description": "There is no valid API key, and the server wants one."},
    404: {"description": "There is no such model."},
    408: {"description": "The body came too slowly."},
    413: {"description": "The body is longer than the server takes."},
    429: {
        "description": "As many requests run and wait, or bytes are on their way, as the server takes; try again.",
        "headers": RETRY_AFTER,
    },
    500: {"description": "The server failed; its log says more."},
    503: {"description": "The engine is gone, or ended the request; try again."},
}
KEY = {"type": "http", "scheme": "bearer", "description": "Where the server has API keys."}
REFERENCE = "#/components/schemas/{model}"


def failures(*, of_model: bool = True) -> Responses:
    """Every status code but 200, with its body; 404 only where a model is named."""
    found = {status: each for status, each in FAILURES.items() if of_model or status != 404}
    return {status: {"model": ErrorReply, **each} for status, each in found.items()}


def streamed(chunk: type[BaseModel]) -> Responses:
    """The answers of a route that can stream."""
    events = {
        "schema": {
            "type": "string",
            "description": f"Events whose data is a {chunk.__name__} in JSON.",
            "x-event-data": {"$ref": REFERENCE.format(model=chunk.__name__)},  # OpenAPI has no word for it before 3.2
        },
        "example": 'data: {"id": "…", "choices": […]}\n\ndata: [DONE]\n\n',
    }
    answer = {
        "description": "The whole answer; with `stream`, server-sent events as the model generates, the last of them "
        "`data: [DONE]`. A failure on the way is an event `error` with an `ErrorReply`, after which nothing comes.",
        "content": {"text/event-stream": events},
    }
    return {200: answer} | failures()


def describe(app: FastAPI, *chunks: type[BaseModel]) -> None:
    """Let the document have the models of events, and API keys, which a server may want or not.

    FastAPI's own answer to what is invalid, 422, goes out: here that is 400.
    """
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            schemas = document["components"]["schemas"]
            for operation in (each for path in document["paths"].values() for each in path.values()):
                operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for chunk in chunks:
                schema = chunk.model_json_schema(ref_template=REFERENCE, mode="serialization")
                schemas |= schema.pop("$defs", {}) | {chunk.__name__: schema}
            document["components"]["securitySchemes"] = {"key": KEY}
            document["security"] = [{}, {"key": []}]
        assert app.openapi_schema is not None, "it was generated"
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it
