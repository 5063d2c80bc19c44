"""What clients of the HTTP API send and see, with OpenAI's client library and without one."""

import json
from typing import Any

import httpx
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams

from eagleray.cluster.outputs import RequestOutput
from support.http_server import Server

FIELDS: dict[str, frozenset[str]] = {  # all that the library knows
    "/v1/completions": frozenset(CompletionParams.__annotations__),
    "/v1/chat/completions": frozenset(ChatParams.__annotations__),
}


def create(server: Server, path: str, **body: Any) -> Any:
    """What the library makes of the answer; what it does not know goes as `extra_body`."""
    resource: Any = server.openai.chat.completions if "chat" in path else server.openai.completions
    known = {name: value for name, value in body.items() if name in FIELDS[path]}
    extra = {name: value for name, value in body.items() if name not in FIELDS[path]}
    return resource.create(**{"model": server.served.model_name} | known, extra_body=extra)


def created(server: Server, path: str, **body: Any) -> dict[str, Any]:
    found: dict[str, Any] = create(server, path, **body).model_dump()
    return found


def create_streamed(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    return [chunk.model_dump() for chunk in create(server, path, stream=True, **body)]


def ends(output: RequestOutput) -> list[tuple[str, str | None, int | str | None]]:
    return [(each.text, each.finish_reason, each.stop_reason) for each in output.outputs]


def post(server: Server, path: str, **body: Any) -> dict[str, Any]:
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def streamed(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    """The data of all events, without the last, which is `[DONE]`."""
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        events = answer.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def put_together(chunks: list[dict[str, Any]]) -> list[tuple[str, str | None, int | str | None]]:
    """Texts and ends of the choices of a stream."""
    texts: dict[int, str] = {}
    found: dict[int, tuple[str | None, int | str | None]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        index = choice["index"]
        assert index not in found, "nothing comes after the end"
        text = choice["delta"]["content"] if "delta" in choice else choice["text"]
        texts[index] = texts.get(index, "") + text
        if choice["finish_reason"] is not None:
            found[index] = (choice["finish_reason"], choice["stop_reason"])
    return [(text, *found[index]) for index, text in sorted(texts.items())]
