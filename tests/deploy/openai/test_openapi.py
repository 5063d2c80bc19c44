"""The description of the API is true."""

from typing import Any

import httpx
import pytest

from support.http_server import Server

PATHS = {
    "/v1/completions": "post",
    "/v1/chat/completions": "post",
    "/v1/models": "get",
    "/v1/models/{model}": "get",
    "/tokenize": "post",
    "/detokenize": "post",
    "/tokenizer_info": "get",
    "/load": "get",
    "/version": "get",
}
GENERATION = [path for path in PATHS if path.endswith("completions")]


@pytest.fixture
def description(tiny: Server) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(tiny.url + "/openapi.json").json()
    return answer


def schema_of(description: dict[str, Any], path: str) -> list[dict[str, Any]]:
    """The models that a path's body may be."""
    content = description["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    references = [each["$ref"] for each in content.get("oneOf", content.get("anyOf", [content]))]
    return [description["components"]["schemas"][reference.rsplit("/", 1)[1]] for reference in references]


def test_every_path_is_described(tiny: Server, description: dict[str, Any]) -> None:
    assert {path: next(iter(methods)) for path, methods in description["paths"].items()} == PATHS
    for path, method in PATHS.items():
        operation = description["paths"][path][method]
        assert operation["description"]
        assert operation["responses"]["200"]["content"]["application/json"]["schema"], "a form of the answer"
        assert "422" not in operation["responses"], "what is invalid is 400"
    assert httpx.get(tiny.url + "/docs").status_code == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_examples_can_be_sent_and_fields_are_described(tiny: Server, description: dict[str, Any], path: str) -> None:
    for schema in schema_of(description, path):
        assert schema["additionalProperties"]["enum"] == [None, "", [], {}], "what asks for nothing"
        for name, field in schema["properties"].items():
            assert "description" in field or name in schema["required"], name
        for example in schema["examples"]:
            answer = httpx.post(tiny.url + path, json=example, timeout=60)
            assert answer.status_code == 200, answer.text


def bounds(field: dict[str, Any]) -> dict[str, float]:
    """Of a number that may be null."""
    (number,) = [each for each in field.get("anyOf", ()) if each.get("type") in ("number", "integer")] or [{}]
    return {name: value for name, value in number.items() if "inimum" in name or "aximum" in name}


def whole(number: float) -> float:
    """As JSON of a client has it."""
    return int(number) if float(number).is_integer() else number


@pytest.mark.parametrize("path", GENERATION)
def test_bounds_are_where_the_server_has_them(tiny: Server, description: dict[str, Any], path: str) -> None:
    (schema,) = schema_of(description, path)
    found = {name: bounds(field) for name, field in schema["properties"].items() if bounds(field)}
    assert len(found) > 10
    together: dict[str, dict[str, Any]] = {
        "n": {"max_tokens": 1},
        "min_tokens": {"max_tokens": 2},
        "top_logprobs": {"logprobs": True},
        "max_completion_tokens": {"max_tokens": None},
    }
    for name, limits in found.items():
        for kind, limit in ((kind, whole(limit)) for kind, limit in limits.items()):
            beyond = limit if "exclusive" in kind else limit + (1 if "max" in kind.lower() else -1)
            body = schema["examples"][0] | together.get(name, {}) | {name: whole(beyond)}
            answer = httpx.post(tiny.url + path, json=body, timeout=60)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), answer.text
            if "exclusive" in kind or limit > 1000 or (name, limit) == ("max_tokens", 0):
                continue  # more than the model holds, or than anybody wants to wait for
            within = body | {"max_tokens": 1} | {name: whole(limit)}
            answer = httpx.post(tiny.url + path, json=within, timeout=60)
            assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("path", GENERATION)
def test_errors_and_events_are_described(description: dict[str, Any], path: str) -> None:
    responses = description["paths"][path]["post"]["responses"]
    assert "default" not in responses, "what can be is named"
    for status in ("400", "401", "404", "413", "429", "500", "503"):
        reference = responses[status]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/ErrorReply"
    assert "text/event-stream" in responses["200"]["content"]
    assert "[DONE]" in responses["200"]["description"]
