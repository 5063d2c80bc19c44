"""Every field of the client library's request types, with every kind of value that these allow.

What would change an answer and is not there is refused by name; what asks for nothing is accepted and changes nothing;
a reply's message goes back in unchanged. The types are the installed library's, so that a new field fails until it is
looked at.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam, ParsedChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as CompletionParams

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.deploy.batch.replica import AppReplica
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.request_body import LARGE
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.deploy.openai.unsupported_fields import IN_CHATS, IN_COMPLETIONS
from support.local_engine import LocalEngine
from support.tiny_model import END_ID, VOCAB_SIZE, write_tiny_model
from support.typed_values import fields, values

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
TYPES: dict[str, Any] = {COMPLETIONS: CompletionParams, CHATS: ChatParams}
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"prompt": "To be", "max_tokens": 3},
    CHATS: {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3},
}
REQUIRED = {"model", "prompt", "messages"}  # which have tests of their own
THERE: dict[str, tuple[list[Any], Any]] = {  # neutral values, and one that asks; what it does is tested elsewhere
    "frequency_penalty": ([0, 0.0], 1.5),
    "presence_penalty": ([0, 0.0], 1.5),
    "temperature": ([1, 1.0], 0.5),
    "top_p": ([1, 1.0], 0.5),
    "n": ([1], 2),
    "seed": ([], 5),
    "stop": ([[], ""], "x"),
    "logit_bias": ([{}], {"5": 3}),
    "logprobs": ([], None),
    "top_logprobs": ([0], None),
    "max_tokens": ([], 2),
    "max_completion_tokens": ([], 2),
    "echo": ([False], True),
    "best_of": ([1], None),
    "stream": ([False], True),
    "stream_options": ([{}, {"include_usage": False}, {"include_obfuscation": True}], None),
}
BOOKKEEPING = {
    *("metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"),
    *("service_tier", "store", "user"),
}
NOT_THERE: dict[str, list[Any]] = {  # and what asks for nothing, beyond null and what is empty
    "audio": [],
    "function_call": ["none", "auto"],
    "functions": [],
    "modalities": [["text"]],
    "moderation": [],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "suffix": [],
    "tool_choice": ["none", "auto"],
    "tools": [],
    "verbosity": ["medium"],
    "web_search_options": [],
}
EMPTY: list[Any] = ["", [], {}]
FIELDS = [(path, name) for path, kind in TYPES.items() for name in fields(kind) if name not in REQUIRED]

Ask = Callable[..., Awaitable[tuple[int, dict[str, Any]]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def app_of(tokenizer: Tokenizer) -> tuple[AppReplica, AsyncClient]:
    limits = ModelLimits(max_model_len=1000, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset({END_ID}))
    engine = AsyncClient(LocalEngine(), FrontEnd(tokenizer, limits))
    return AppReplica(make_app(ServedModel(engine, "tiny", 1000, 1))), engine


@pytest.fixture
async def ask(folder: Path) -> AsyncIterator[Ask]:
    app, engine = app_of(Tokenizer.from_dir(folder))
    yield asking(app)
    engine.close()


def asking(app: AppReplica) -> Ask:
    async def ask(path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        answer = await app.answer(path, json.dumps(body).encode())
        return answer.status, {} if body.get("stream") else json.loads(answer.body)

    return ask


def test_every_field_is_known_here() -> None:
    for path, kind in TYPES.items():
        assert set(fields(kind)) <= REQUIRED | set(THERE) | BOOKKEEPING | set(NOT_THERE), path


@pytest.mark.parametrize(("path", "field"), FIELDS)
async def test_null_and_neutral_values_ask_for_nothing(ask: Ask, path: str, field: str) -> None:
    neutral = [None, *(THERE[field][0] if field in THERE else NOT_THERE.get(field, []))]
    if field in NOT_THERE and field not in ("web_search_options", "reasoning_effort", "verbosity"):
        neutral += EMPTY
    body = {name: value for name, value in BODIES[path].items() if name != "max_tokens" or "max" not in field}
    if "max" in field:
        body["stop_token_ids"] = [*range(0, VOCAB_SIZE, 8)]  # else it might run as long as the model allows
    _, plain = await ask(path, **body)
    for value in neutral:
        status, answer = await ask(path, **body | {field: value})
        assert status == 200, answer
        assert answer["choices"] == plain["choices"]


@pytest.mark.parametrize("field", sorted(BOOKKEEPING))
@pytest.mark.parametrize("path", TYPES)
async def test_bookkeeping_changes_nothing(ask: Ask, path: str, field: str) -> None:
    _, plain = await ask(path, **BODIES[path])
    for value in values(fields(ChatParams)[field]):
        status, answer = await ask(path, **BODIES[path] | {field: value})
        assert (status, answer.get("choices")) == (200, plain["choices"]), answer


@pytest.mark.parametrize(("path", "field"), [each for each in FIELDS if each[1] in NOT_THERE])
async def test_what_is_not_there_is_refused_by_name(ask: Ask, path: str, field: str) -> None:
    assert asking_values(field) or field == "parallel_tool_calls"
    for value in asking_values(field):
        status, answer = await ask(path, **BODIES[path] | {field: value})
        assert (status, answer.get("error", {}).get("param")) == (400, field), (value, answer)
        assert field in answer["error"]["message"]


@pytest.mark.parametrize("large", [False, True], ids=["at once", "in a thread"])
@pytest.mark.parametrize("path", [*TYPES, "/tokenize", "/detokenize"])
async def test_a_value_that_a_refusal_names_is_accepted(ask: Ask, path: str, large: bool) -> None:
    body = BODIES.get(path, {"tokens": [1]} if path == "/detokenize" else {"messages": BODIES[CHATS]["messages"]})
    if large:
        body = body | {"x" * LARGE: None}
    named = 0
    for field in IN_COMPLETIONS | IN_CHATS:
        status, answer = await ask(path, **body, **{field: {"asks": "for something"}})
        if status == 200 or "or give " not in answer["error"]["message"]:
            continue
        for value in answer["error"]["message"].partition("or give ")[2].split(" or "):
            named += 1
            status, answer = await ask(path, **body, **{field: json.loads(value)})
            assert status == 200, answer
    assert named or path == "/detokenize"


@pytest.mark.parametrize(("path", "field"), [each for each in FIELDS if each[1] in THERE])
async def test_what_is_there_may_be_asked_for(ask: Ask, path: str, field: str) -> None:
    value = THERE[field][1]
    if value is not None:
        status, answer = await ask(path, **BODIES[path] | {field: value})
        assert status == 200, answer


@pytest.mark.parametrize("form", [{"type": "text", "json_schema": None}, {"json_schema": None}])
async def test_parts_that_are_null_ask_for_nothing(ask: Ask, form: dict[str, Any]) -> None:
    for path, body in BODIES.items():
        status, answer = await ask(path, **body, response_format=form)
        assert status == 200, answer
        status, answer = await ask(path, **body, response_format=form | {"type": "json_object"})
        assert (status, answer["error"]["param"]) == (400, "response_format")


async def test_options_of_streams(ask: Ask) -> None:
    for path, body in BODIES.items():
        for value in values(fields(TYPES[path])["stream_options"]):
            status, _ = await ask(path, **body, stream=True, stream_options=value)
            assert status == 200
        status, answer = await ask(path, **body, stream_options={"include_usage": True})
        assert (status, answer["error"]["param"]) == (400, "stream_options")


MESSAGES = values(ChatCompletionMessageParam)
NULLS = [
    message | {field: None}
    for message in MESSAGES
    for field in ("refusal", "annotations", "audio", "function_call", "tool_calls", "parsed", "name", "invented")
    if set(message) == {"role", "content"} and isinstance(message["content"], str)
]
EXTRA: list[dict[str, Any]] = [
    {"id": "msg_1"},
    {"timestamp": 17.5},
    {"weight": 0},
    {"reasoning_content": "Hm"},
    {"annotations": []},
]
EXTRAS = [{"role": "user", "content": "text"} | extra for extra in EXTRA]
EXTRAS += [{"role": "user", "content": [{"type": "text", "text": "text", "cache_control": {"type": "ephemeral"}}]}]


def text_of(message: dict[str, Any]) -> str | None:
    """What it says; None if it is more than text, or says nothing though it must."""
    more = any(message.get(name) for name in ("audio", "tool_calls", "function_call"))
    content = message.get("content")
    if more or (content is None and message["role"] not in ("assistant", "function")):
        return None
    if isinstance(content, list):
        if any(part["type"] not in ("text", "refusal") for part in content):
            return None
        content = "\n".join(part.get("text", part.get("refusal")) for part in content)
    return content or message.get("refusal") or ""


@pytest.mark.parametrize("messages", [MESSAGES, NULLS, EXTRAS], ids=["types", "nulls", "extras"])
async def test_messages_say_their_text_or_are_refused_by_name(ask: Ask, messages: list[dict[str, Any]]) -> None:
    outcomes = set()
    for message in messages:
        text = text_of(message)
        for path in (CHATS, "/tokenize"):
            status, answer = await ask(path, messages=[message], **({"max_tokens": 2} if path == CHATS else {}))
            outcomes.add(status)
            if text is None:
                assert status == 400, message
                assert answer["error"]["param"].startswith("messages.0."), answer
            else:
                assert status == 200, (message, answer)
        if text is not None:
            named = {"name": message["name"]} if message.get("name") else {}
            role = {"developer": "system"}.get(message["role"], message["role"])
            _, plain = await ask("/tokenize", messages=[{"role": role, "content": text} | named])
            assert answer["tokens"] == plain["tokens"], message
    assert outcomes == ({200, 400} if messages is MESSAGES else {200})


async def test_a_reply_goes_back_in_unchanged(ask: Ask, folder: Path) -> None:
    """In every form that the client library gives it, whole or gathered from a stream."""
    _, longer = await ask(CHATS, **BODIES[CHATS])
    stop = longer["choices"][0]["message"]["content"][-1]  # so that it ends by itself, as the library wants it
    request = BODIES[CHATS] | {"stop": stop}
    _, body = await ask(CHATS, **request)
    reply = ChatCompletion.model_validate(body)
    parsed = ParsedChatCompletion[None].model_validate(body)
    gathered = ChatCompletionStreamState()
    app, engine = app_of(Tokenizer.from_dir(folder))
    events = (await app.answer(CHATS, json.dumps(request | {"stream": True}).encode())).body.split(b"\n\n")
    engine.close()
    for event in events[:-2]:
        gathered.handle_chunk(ChatCompletionChunk.model_validate_json(event.removeprefix(b"data: ")))
    messages = [each.choices[0].message for each in (reply, parsed, gathered.get_final_completion())]
    assert len({message.content for message in messages}) == 1
    question = {"role": "user", "content": "Why?"}
    _, plain = await ask("/tokenize", messages=[{"role": "assistant", "content": messages[0].content}, question])
    forms = [body["choices"][0]["message"], *(message.model_dump() for message in messages)]
    forms += [*(message.model_dump(mode="json") for message in messages), *(m.to_dict() for m in messages)]
    forms += [json.loads(message.model_dump_json()) for message in messages]
    for form in forms:
        status, tokens = await ask("/tokenize", messages=[form, question])
        assert (status, tokens.get("tokens")) == (200, plain["tokens"]), form
        assert (await ask(CHATS, messages=[form, question], max_tokens=2))[0] == 200


def asking_values(field: str) -> list[Any]:
    """Values of a field that ask for something."""
    kind = next(fields(kind)[field] for kind in TYPES.values() if field in fields(kind))
    nothing = [None, *NOT_THERE[field], *([] if field == "web_search_options" else EMPTY)]
    return [each for each in values(kind) if not any(type(each) is type(other) and each == other for other in nothing)]
