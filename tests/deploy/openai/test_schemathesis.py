"""The OpenAPI document against the server, by schemathesis: what it allows, what it forbids, and what comes back.

The server is a whole one: API keys, a limit on bodies and a bounded queue around the application.
"""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from jsonschema_rs import Draft202012Validator
from schemathesis import Case, GenerationMode
from schemathesis.checks import load_all_checks, negative_data_rejection, not_a_server_error
from schemathesis.openapi import from_url
from schemathesis.specs.openapi import checks

from eagleray.cluster.async_llm import AsyncLLM
from support.http_server import Server, guarded, serving
from support.other_stream import another_streams
from support.tiny_model import write_tiny_model

MAX_MODEL_LEN = 64  # so that no example runs for long
KEY = "schemathesis"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MAX_BODY_BYTES = 100_000
MAX_REQUESTS = 3
GENERATION = ["/v1/completions", "/v1/chat/completions"]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
}
POSTS = [*GENERATION, "/tokenize", "/detokenize"]
GETS = ["/v1/models", "/v1/models/{model}", "/version", "/load", "/tokenizer_info"]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
load_all_checks()
CONFORMANCE = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    engine = AsyncLLM(
        path, max_model_len=MAX_MODEL_LEN, block_size=16, kv_cache_bytes=4_000_000, max_num_seqs=8, threads_per_rank=1
    )
    with serving(engine, "tiny", MAX_MODEL_LEN, guarded(KEY, MAX_BODY_BYTES, MAX_REQUESTS), KEY) as server:
        yield server


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return from_url(f"{server.url}/openapi.json", headers=HEADERS)


@pytest.fixture(scope="module")
def events(document: Any) -> dict[str, Draft202012Validator]:
    """What says whether the data of an event is as described."""
    found = {}
    for path in GENERATION:
        answer = document.raw_schema["paths"][path]["post"]["responses"]["200"]["content"]["text/event-stream"]
        schema = answer["schema"]["x-event-data"] | {"components": document.raw_schema["components"]}
        found[path] = Draft202012Validator(schema)
    return found


def for_short(body: Any) -> Any:
    """The same request for the model that is there and for a few tokens: any valid number of them is as good."""
    if not isinstance(body, dict):
        return body
    most = {"n": 4096, "max_tokens": 2**31 - 1, "max_completion_tokens": 2**31 - 1, "min_tokens": 2**31 - 1}
    fewer = {name: 1 + body[name] % 8 for name in most if type(body.get(name)) is int and 1 <= body[name] <= most[name]}
    return body | fewer | ({"model": "tiny"} if isinstance(body.get("model"), str) else {})


def check_events(text: str, validator: Draft202012Validator) -> None:
    *chunks, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    for chunk in chunks:
        validator.validate(json.loads(chunk.removeprefix("data: ")))


@pytest.mark.parametrize("mode", [POSITIVE, NEGATIVE], ids=str)
@pytest.mark.parametrize("path", POSTS)
def test_bodies_are_answered_as_described(
    server: Server, document: Any, events: dict[str, Draft202012Validator], path: str, mode: GenerationMode
) -> None:
    """What the document forbids is refused; what it allows may be, for reasons that it cannot say."""
    seen: set[int] = set()

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(document[path]["POST"].as_strategy(generation_mode=mode))
    def run(case: Case[Any]) -> None:
        case.body = for_short(case.body)
        response = case.call(headers=HEADERS, timeout=20)
        is_stream = response.headers["content-type"][0].startswith("text/event-stream")
        left_out = {checks.response_schema_conformance} if is_stream else set()
        conformance = [check for check in CONFORMANCE if check not in left_out]
        case.validate_response(response, checks=conformance + [negative_data_rejection] * (mode is NEGATIVE))
        if is_stream:  # whose schema is that of the whole text, and schemathesis would hold each event to it
            check_events(response.text, events[path])
        seen.add(response.status_code)

    with another_streams(server.openai, max_tokens=40):
        run()
        for _ in range(4):  # of twenty bodies that the document allows, all may be refused
            if mode is POSITIVE and 200 not in seen:
                run()
    assert seen <= {200, 400, 404}
    assert (200 in seen) == (mode is POSITIVE)
    server.wait_until(server.is_idle)


@pytest.mark.parametrize("path", GENERATION)
def test_events_with_everything_in_them_are_as_described(
    server: Server, events: dict[str, Draft202012Validator], path: str
) -> None:
    body = BODIES[path] | {"stream": True, "stream_options": {"include_usage": True}, "n": 2, "max_tokens": 4}
    body |= {"logprobs": 2} if path == "/v1/completions" else {"logprobs": True, "top_logprobs": 2}
    answer = httpx.post(server.url + path, json=body, headers=HEADERS, timeout=20)
    assert answer.text.count('"usage"') == 1
    assert 'top_logprobs"' in answer.text  # of how many events depends on how many steps each holds
    check_events(answer.text, events[path])


@pytest.mark.parametrize("path", GETS)
def test_reading_is_answered_as_described(document: Any, path: str) -> None:
    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(document[path]["GET"].as_strategy(generation_mode=POSITIVE))
    def run(case: Case[Any]) -> None:
        case.call_and_validate(headers=HEADERS, timeout=20, checks=CONFORMANCE)

    run()


@pytest.mark.parametrize("path", [*POSTS, *GETS])
def test_what_guards_refuse_is_described_on_every_path(server: Server, document: Any, path: str) -> None:
    operation = document[path]["POST" if path in POSTS else "GET"]
    long = {"prompt": "a" * MAX_BODY_BYTES}
    case = operation.Case(path_parameters={"model": "tiny"}, body=long, media_type="application/json")
    assert case.call_and_validate(headers=HEADERS, checks=CONFORMANCE).status_code == 413
    assert case.call_and_validate(headers={"Authorization": "Bearer another"}, checks=CONFORMANCE).status_code == 401
    refused = case.call_and_validate(headers=HEADERS | {"X-Request-Id": "not one"}, checks=CONFORMANCE)
    assert refused.status_code == 400


@pytest.mark.parametrize("path", GENERATION)
def test_a_full_queue_is_as_described(server: Server, document: Any, path: str) -> None:
    case = document[path]["POST"].Case(body=BODIES[path] | {"stream": True})
    long = {"prompt": "a", "ignore_eos": True, "max_tokens": MAX_MODEL_LEN - 1}
    over = threading.Event()
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:

        def ask() -> None:
            while not over.is_set():
                client.post("/v1/completions", json=long)

        threads = [threading.Thread(target=ask) for _ in range(2 * MAX_REQUESTS)]
        for thread in threads:
            thread.start()
        try:
            while (answer := case.call(headers=HEADERS)).status_code != 429:
                pass  # a stream: there was room still
        finally:
            over.set()
            for thread in threads:
                thread.join()
    case.validate_response(answer, checks=CONFORMANCE)
    assert answer.headers["retry-after"] == ["1"]
