"""What cannot be served is refused in OpenAI's shape, with the field's name, and hurts nobody else."""

import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.http_server import Server
from support.other_stream import another_streams

COMPLETION: dict[str, Any] = {"prompt": "To be", "max_tokens": 2}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
BODIES = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}

UNKNOWN = {  # of other servers and of the other endpoint
    "/v1/completions": {"invented", "top_logprobs", "messages", "max_completion_tokens", "grammar"},
    "/v1/chat/completions": {"invented", "prompt", "grammar"},
}


def refused(tiny: Server, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error, which has OpenAI's shape."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(tiny.url + path, content=content, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.json()) == {"error"}
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return error


@pytest.mark.parametrize(("path", "field"), [(path, field) for path in UNKNOWN for field in sorted(UNKNOWN[path])])
def test_an_unknown_field_is_named_if_it_asks_for_something(tiny: Server, path: str, field: str) -> None:
    for value in (1, 0, True, False, "text", [0], {"type": "text"}):
        error = refused(tiny, path, BODIES[path] | {field: value})
        assert error["param"] == field
        assert error["message"] == f"{field} is a field that this server does not have; leave it out"
    nothings: list[Any] = [None, "", [], {}]
    for nothing in nothings:
        assert httpx.post(tiny.url + path, json=BODIES[path] | {field: nothing}, timeout=60).status_code == 200


@pytest.mark.parametrize("path", BODIES)
def test_all_unknown_fields_are_named_up_to_a_number(tiny: Server, path: str) -> None:
    error = refused(tiny, path, BODIES[path] | {"foo": 1, "temperature": 1, "bar": 2})
    assert error["message"] == "foo, bar are fields that this server does not have; leave them out"
    error = refused(tiny, path, BODIES[path] | {f"field_{number}": 1 for number in range(25)})
    assert "field_19 and 5 more are fields" in error["message"]


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        ("/v1/completions", {"max_tokens": 5000}),
        ("/v1/completions", {"prompt": [5] * 5000}),
        ("/v1/completions", {"prompt": "a b " * 2000}),
        ("/v1/completions", {"prompt": "a" * 1_000_000}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a b " * 2000}]}),
    ],
)
def test_what_is_too_long_for_the_model_has_the_code_that_clients_look_for(
    tiny: Server, path: str, changes: dict[str, Any]
) -> None:
    assert refused(tiny, path, BODIES[path] | changes)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("priority", [2**70, -(2**70)])
def test_a_priority_beyond_the_range_is_told_the_range(tiny: Server, priority: int) -> None:
    assert "from -" in refused(tiny, "/v1/completions", COMPLETION | {"priority": priority})["message"]


BAD_BOTH: list[tuple[dict[str, Any], str | None]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 5000}, "n"),
    ({"n": "2"}, "n"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 511}, None),
    ({"max_tokens": 2**31}, "max_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"258": 1}}, "logit_bias"),
    ({"logit_bias": {"9" * 30: 1}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"logit_bias": {"5": 1, "05": -1}}, "logit_bias"),
    ({"stop": ["\udc00"]}, "stop"),
    ({"stop": "a\udc00"}, "stop"),
    ({"stop": [""]}, "stop"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"metadata": ["a"]}, "metadata"),
    ({"store": "yes"}, "store"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["a"] * 65}, "stop"),
    ({"stop_token_ids": [258]}, "stop_token_ids"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"priority": 2**31}, "priority"),
    ({"priority": "high"}, "priority"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include": True}}, "stream_options.include"),
    ({"user": 5}, "user"),
]
BAD_COMPLETIONS: list[tuple[dict[str, Any], str | None]] = [
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [""]}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1, "a"]}, "prompt"),
    ({"prompt": [True]}, "prompt"),
    ({"prompt": [["a"]]}, "prompt"),
    ({"prompt": [258]}, None),
    ({"prompt": [-1]}, None),
    ({"echo": True, "max_tokens": 0, "min_tokens": 5}, "min_tokens"),
    ({"max_tokens": None, "min_tokens": 2**31}, "min_tokens"),
    ({"prompt": [2**40]}, None),
    ({"prompt": ["fine", "x" * 600]}, None),
    ({"prompt": "x" * 600}, None),
    ({"prompt": ["a"] * 70, "n": 60}, "n"),
    ({"prompt": "\ud800"}, None),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
]
BAD_CHATS: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": [5]}, "messages.0"),
    ({"messages": [{"content": "Hi"}]}, "messages.0.role"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "name": 5}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "audio": {"id": "a"}}]}, "messages.1.audio"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "assistant", "function_call": {"name": "f"}}]}, "messages.0.function_call"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "wizard", "content": "a"}]}, "messages.1.role"),
    ({"messages": [{"role": "", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "a", "name": "\ud800"}]}, None),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, None),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, None),
    ({"logprobs": 2}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": 3, "max_tokens": 0}, "max_tokens"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"return_assistant_tokens_mask": True}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": 5}, "chat_template_kwargs"),
]
CASES = [
    *[("/v1/completions", *case) for case in BAD_BOTH + BAD_COMPLETIONS],
    *[("/v1/chat/completions", *case) for case in BAD_BOTH + BAD_CHATS],
]


@pytest.mark.parametrize(("path", "changes", "param"), CASES, ids=lambda value: str(value)[:40])
def test_a_bad_value_is_named(tiny: Server, path: str, changes: dict[str, Any], param: str | None) -> None:
    for body in (BODIES[path] | changes, {"stream": True} | BODIES[path] | changes):
        if changes.get("stream_options") != {"include_usage": True} or "stream" not in body:
            error = refused(tiny, path, body)
            assert error["param"] == param, error


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"5", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"a": NaN}'],
    ids=lambda value: repr(value[:12]),
)
def test_a_body_that_is_no_request_is_refused(tiny: Server, path: str, body: bytes) -> None:
    refused(tiny, path, body)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
def test_a_conversation_without_messages_is_refused_in_plain_words(tiny: Server, path: str) -> None:
    assert refused(tiny, path, {"messages": []})["message"] == "messages is []; give at least 1 item"


def test_not_a_number_is_refused(tiny: Server) -> None:
    for number in (b"NaN", b"Infinity", b"1e999"):
        refused(tiny, "/v1/completions", b'{"prompt": "a", "temperature": ' + number + b"}")


@pytest.mark.parametrize(
    ("path", "changes", "words"),
    [
        ("/v1/completions", {"seed": 2**64}, "null to have one derived"),
        ("/v1/completions", {"max_tokens": 0}, "null for 16"),
        ("/v1/completions", {"logprobs": 21}, "from 0 to 20, or null"),
        ("/v1/chat/completions", {"max_tokens": 0}, "null for all that the model holds"),
        ("/v1/chat/completions", {"max_completion_tokens": 0}, "null for all that the model holds"),
        ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 21}, "from 0 to 20, or null"),
        ("/v1/chat/completions", {"allowed_token_ids": []}, "a list of at least one token id, or null"),
        ("/v1/chat/completions", {"truncate_prompt_tokens": 0}, "null for all"),
    ],
)
def test_a_way_out_is_in_the_words_of_json(tiny: Server, path: str, changes: dict[str, Any], words: str) -> None:
    error = refused(tiny, path, BODIES[path] | changes)
    assert error["message"].endswith(words)
    assert "None" not in error["message"]
    (name,) = changes.keys() - {"logprobs"} or changes
    assert error["param"] == name


def test_a_body_that_is_not_said_to_be_json_is_refused_with_the_remedy(tiny: Server) -> None:
    answer = httpx.post(tiny.url + "/v1/completions", content=json.dumps(COMPLETION))
    assert (answer.status_code, "content-type: application/json" in answer.text) == (400, True)


def test_a_name_that_is_no_text_is_refused_as_such(tiny: Server) -> None:
    error = refused(tiny, "/v1/completions", b'{"prompt": "a", "\\udc00": 1}')
    assert "content-type" not in error["message"]
    assert "name of a field" in error["message"]


def test_an_answer_that_comes_to_where_nothing_may_follow_is_refused(tiny: Server) -> None:
    (letter,) = httpx.post(tiny.url + "/tokenize", json={"prompt": "a"}).json()["tokens"]
    asked = COMPLETION | {"allowed_token_ids": [letter], "bad_words": ["aaa"], "max_tokens": 5, "ignore_eos": True}
    assert "no token is left to draw" in refused(tiny, "/v1/completions", asked)["message"]
    assert httpx.post(tiny.url + "/v1/completions", json=asked | {"max_tokens": 2}).status_code == 200


def test_tokens_that_the_tokenizer_has_not_are_refused(tiny: Server) -> None:
    for token_id in (-1, 258, 2**80):
        error = refused(tiny, "/detokenize", {"tokens": [65, token_id]})
        assert error["message"] == f"tokens holds {token_id}; give token ids from 0 to 257"
    refused(tiny, "/tokenize", {"prompt": "\ud800"})
    refused(tiny, "/tokenize", {"prompt": "a", "messages": []})
    assert refused(tiny, "/tokenize", {"prompt": "a", "return_token_strs": 1})["param"] == "return_token_strs"


LONG = "x" * 100_000
LONG_VALUES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"model": LONG}),
    ("/tokenize", {"prompt": "a", "model": LONG}),
    ("/v1/completions", {LONG: 1}),
    ("/v1/completions", {"temperature": LONG}),
    ("/v1/completions", {"stop": ["x" * 9000, ""]}),
    ("/v1/completions", {"stop": [""] + ["x" * 250] * 60}),
    ("/v1/completions", {"logit_bias": {LONG: 1}}),
    ("/v1/completions", {"logit_bias": {LONG: "a"}}),
    ("/v1/completions", {"seed": 10**4000}),
    ("/v1/completions", {"logprobs": 10**4000}),
    ("/v1/chat/completions", {"top_logprobs": 10**4000, "logprobs": True}),
    ("/v1/chat/completions", {"max_completion_tokens": 10**4000, "max_tokens": None}),
    ("/v1/chat/completions", {"messages": [{"role": LONG, "content": "a"}]}),
    ("/v1/chat/completions", {"tools": [{"name": LONG}]}),
    ("/v1/chat/completions", {"messages": [{"role": "assistant", "tool_calls": [{"id": LONG}]}]}),
    ("/detokenize", {"tokens": [10**4000]}),
]


@pytest.mark.parametrize(("path", "changes"), LONG_VALUES, ids=lambda value: str(value)[:40])
def test_a_message_repeats_no_more_than_the_beginning_of_a_value(
    tiny: Server, path: str, changes: dict[str, Any]
) -> None:
    error = refused(tiny, path, BODIES.get(path, {}) | changes, 404 if "model" in changes else 400)
    assert len(error["message"]) <= 1001
    assert "…" in error["message"]
    assert len(error["param"] or "") <= 200


def test_a_role_that_nobody_knows_is_told_those_that_work(tiny: Server) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        error = refused(tiny, path, {"messages": [{"role": "wizard", "content": "a"}]})
        assert error["message"].startswith("messages.0.role is 'wizard'; give system, developer, user, assistant, tool")


def test_another_model_is_not_found(tiny: Server) -> None:
    for path, body in (*BODIES.items(), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        error = refused(tiny, path, body | {"model": "gpt-4"}, 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
        assert error["message"] == "the model 'gpt-4' does not exist; this server has 'tiny'"
    with pytest.raises(openai.NotFoundError):
        tiny.openai.models.retrieve("org/gpt-4")


def test_the_client_library_knows_the_errors(tiny: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        tiny.openai.completions.create(model="tiny", prompt="a", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        tiny.openai.completions.create(model="gpt-4", prompt="a", stream=True)


def test_unknown_paths_and_methods_have_the_same_shape(tiny: Server) -> None:
    for answer, status in ((httpx.get(tiny.url + "/v2"), 404), (httpx.get(tiny.url + "/v1/completions"), 405)):
        assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
SMALL = st.integers(-2, 4)  # so that no example runs for long
PLAUSIBLE: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.floats(-0.5, 3) | SMALL,
    "top_p": st.floats(-0.1, 1.1),
    "top_k": st.integers(-3, 300),
    "min_p": st.floats(-0.1, 1.1),
    "n": SMALL,
    "seed": st.integers(-(2**64), 2**65),
    "stop": st.text(max_size=3) | st.lists(st.text(max_size=3), max_size=3),
    "presence_penalty": st.floats(-3, 3),
    "frequency_penalty": st.floats(-3, 3),
    "repetition_penalty": st.floats(-1, 3),
    "logit_bias": st.dictionaries(st.integers(-1, 300).map(str), st.floats(-110, 110), max_size=3),
    "stop_token_ids": st.lists(st.integers(-1, 300), max_size=3),
    "allowed_token_ids": st.lists(st.integers(-1, 300), max_size=3),
    "ignore_eos": st.booleans(),
    "min_tokens": SMALL,
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "echo": st.booleans(),
    "logprobs": st.integers(-1, 22) | st.booleans(),
    "top_logprobs": st.integers(-1, 22),
    "priority": st.integers(-(2**32), 2**32),
    "user": st.text(max_size=3),
    "add_special_tokens": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "chat_template_kwargs": st.dictionaries(st.sampled_from(["mood", "tools", "self", "x"]), ANY_JSON, max_size=2),
    "continue_final_message": st.booleans(),
}
PROMPTS = st.text(max_size=20) | st.lists(st.integers(-1, 300), max_size=5) | st.lists(st.text(max_size=5), max_size=3)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "x"]), "content": st.text(max_size=10) | ANY_JSON}
)


def _fields(names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    some = {name: st.one_of(PLAUSIBLE[name], PLAUSIBLE[name], PLAUSIBLE[name], ANY_JSON) for name in names}
    return st.fixed_dictionaries({"max_tokens": SMALL, **some})


SOME_FIELDS = st.lists(st.sampled_from(sorted(PLAUSIBLE)), max_size=3, unique=True).flatmap(
    _fields
)  # of more, one is wrong
REQUESTS = st.one_of(
    st.tuples(
        st.just("/v1/completions"), st.tuples(SOME_FIELDS, st.fixed_dictionaries({"prompt": PROMPTS | ANY_JSON}))
    ),
    st.tuples(
        st.just("/v1/chat/completions"),
        st.tuples(SOME_FIELDS, st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=2) | ANY_JSON})),
    ),
    st.tuples(st.sampled_from(["/tokenize", "/detokenize"]), st.tuples(ANY_JSON.filter(lambda v: isinstance(v, dict)))),
)


def test_nothing_that_is_sent_breaks_or_blocks_the_server(tiny: Server) -> None:
    """While any bodies come in, another client's stream goes on; every answer comes soon, and none is 500."""
    with another_streams(tiny.openai, max_tokens=50), httpx.Client(base_url=tiny.url, timeout=20) as client:
        _fuzz(client)
    tiny.wait_until(tiny.is_idle)


def _fuzz(client: httpx.Client) -> None:
    seen: set[int] = set()

    @settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(REQUESTS)
    def run(request: tuple[str, tuple[dict[str, Any], ...]]) -> None:
        path, parts = request
        body = {name: value for part in parts for name, value in part.items()}
        answer = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404), answer.text
        assert "event: error" not in answer.text
        seen.add(answer.status_code)

    run()
    assert {200, 400} <= seen
