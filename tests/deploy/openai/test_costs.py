"""What one request may cost: refused beyond, and never another's trouble."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from eagleray.cluster.outputs import Logprob
from eagleray.deploy.openai.field_types import MAX_STOP_CHARACTERS
from eagleray.deploy.openai.large import PART, SMALL, parts, written
from eagleray.deploy.openai.limits import MAX_ANSWER_LOGPROBS, MAX_CHARACTERS, MAX_TOKENIZED
from eagleray.deploy.openai.logprobs import chat_logprobs
from eagleray.deploy.openai.responses import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    PromptTokensDetails,
    Usage,
)
from support.http_client import streamed
from support.http_server import Server
from support.local_server import MAX_MODEL_LEN, local_server

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}{{ message.content }}{% endfor %}"
    "{% for i in range(far) %}{% for j in range(far) %}{% endfor %}{% endfor %}{{ 1 / divisor }}{{ 10.0 ** power }}"
    "{{ 'x' * times }}{% macro again() %}{{ again() }}{% endmacro %}{% if recurse %}{{ again() }}{% endif %}"
    "{{ missing.at.all if miss }}"
)
MESSAGES = [{"role": "user", "content": "Hello"}]
USUAL: dict[str, Any] = {"far": 1, "divisor": 1, "power": 1, "times": 1, "recurse": False, "miss": False}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with local_server(tmp_path_factory.mktemp("toy"), TEMPLATE) as server:
        yield server


def post(server: Server, path: str, **body: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, timeout=120)


def refusal(server: Server, path: str, **body: Any) -> dict[str, Any]:
    reply = post(server, path, **body)
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({"divisor": 0}, "division by zero"),
        ({"power": 1000}, "out of range"),
        ({"recurse": True}, "recursion"),
        ({"miss": True}, "'missing' is undefined"),
        ({"divisor": "a"}, "unsupported operand"),
        ({"times": 10**9}, "512 MiB"),
        ({"far": 10**5}, "takes more than"),
        ({"far": 10**9}, "Range too big"),
    ],
)
def test_what_a_template_cannot_do_is_the_clients_to_fix(server: Server, variables: dict[str, Any], why: str) -> None:
    for path in ("/v1/chat/completions", "/tokenize"):
        assert why in refusal(server, path, messages=MESSAGES, chat_template_kwargs=USUAL | variables)["message"]
        assert post(server, path, messages=MESSAGES, chat_template_kwargs=USUAL).status_code == 200


@pytest.mark.parametrize("stop", ["x" * (MAX_STOP_CHARACTERS + 1), ["x" * 3900] * 64])
def test_stop_texts_have_a_length_together(server: Server, stop: Any) -> None:
    error = refusal(server, "/v1/completions", prompt="a", stop=stop)
    assert error["param"] == "stop"
    assert f"give at most {MAX_STOP_CHARACTERS}" in error["message"]
    assert post(server, "/v1/completions", prompt="a", stop=["x" * (MAX_STOP_CHARACTERS // 64)] * 64).status_code == 200


def test_log_probabilities_are_counted_over_all_choices_and_tokens(server: Server) -> None:
    asked: dict[str, Any] = {"n": 400, "max_tokens": 1000}
    assert MAX_ANSWER_LOGPROBS < 400 * 1000 * 21
    for path, others in (
        ("/v1/completions", {"prompt": "a", "logprobs": 20}),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20}),
    ):
        kwargs = {"chat_template_kwargs": USUAL} if "messages" in others else {}
        assert "8400000 log-probabilities" in refusal(server, path, **asked, **others, **kwargs)["message"]


def test_lists_are_counted_over_all_choices(server: Server) -> None:
    lists: dict[str, Any] = {
        "allowed_token_ids": list(range(100)),
        "logit_bias": dict.fromkeys(range(100), 1),
        "stop_token_ids": list(range(50)),
        "bad_words": ["x" * 40, "y" * 10],
    }
    for asked in ({"prompt": "a", "n": 3400}, {"prompt": ["a", "b"] * 17, "n": 100}):
        error = refusal(server, "/v1/completions", **lists, **asked)
        assert "1020000 token ids, biases and letters for 3400 choices" in error["message"]
        assert error["param"] == "logit_bias"
    assert post(server, "/v1/completions", prompt="a", n=10, max_tokens=1, **lists).status_code == 200


def test_arguments_of_calls_are_counted_over_all_messages(server: Server) -> None:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": f"[{'[],' * 30_000}0]"}}]
    messages = [*MESSAGES, *[{"role": "assistant", "tool_calls": calls}] * 4]
    error = refusal(server, "/v1/chat/completions", messages=messages, chat_template_kwargs=USUAL)
    assert "arguments of tool_calls have more than 100000 lists, objects and fields" in error["message"]


def test_variables_of_a_template_are_not_many(server: Server) -> None:
    variables = USUAL | {f"v{number}": 1 for number in range(100)}
    error = refusal(server, "/v1/chat/completions", messages=MESSAGES, chat_template_kwargs=variables)
    assert error["param"] == "chat_template_kwargs"


def test_prompts_in_a_stream_have_few_log_probabilities(server: Server) -> None:
    body: dict[str, Any] = {"prompt": "a" * 1000, "echo": True, "n": 10, "logprobs": 10, "max_tokens": 1}
    error = refusal(server, "/v1/completions", **body, stream=True)
    assert ("110000 log-probabilities of prompts" in error["message"], error["param"]) == (True, "echo")


def test_a_stream_of_a_chat_repeats_no_prompt_too_often(server: Server) -> None:
    messages = [{"role": "user", "content": "a" * 1000}]
    body: dict[str, Any] = {"messages": messages, "n": 4000, "return_token_ids": True, "chat_template_kwargs": USUAL}
    error = refusal(server, "/v1/chat/completions", **body, stream=True, max_tokens=1)
    assert error["param"] == "return_token_ids"


def test_an_echo_is_counted_over_all_choices(server: Server) -> None:
    error = refusal(server, "/v1/completions", prompt="a" * 1000, echo=True, n=4000, max_tokens=1)
    assert error["param"] == "echo"
    assert "4000000 tokens" in error["message"]
    error = refusal(server, "/v1/completions", prompt="a" * 1000, return_token_ids=True, n=4000, max_tokens=1)
    assert error["param"] == "return_token_ids"


def test_texts_to_be_counted_and_tokens_to_be_read_have_a_length(server: Server) -> None:
    for path, name, value in (
        ("/tokenize", "prompt", "a" * (MAX_CHARACTERS + 1)),
        ("/tokenize", "prompt", "a" * (16 * 10**6)),
        ("/detokenize", "tokens", [65] * 3_700_000),
        ("/tokenize", "prompt", "ab" * (MAX_TOKENIZED // 2 + 1)),
        ("/tokenize", "messages", [{"role": "user", "content": "a" * (MAX_CHARACTERS + 1)}]),
        ("/detokenize", "tokens", [5] * (MAX_TOKENIZED + 1)),
    ):
        kwargs = {"chat_template_kwargs": USUAL} if name == "messages" else {}
        assert "at most" in refusal(server, path, **{name: value}, **kwargs)["message"]
    assert post(server, "/tokenize", prompt="a" * MAX_TOKENIZED).json()["count"] == MAX_TOKENIZED
    assert len(post(server, "/detokenize", tokens=[5] * 1000).json()["prompt"]) == 1000


def test_a_text_far_longer_than_the_model_is_refused_by_its_beginning(server: Server) -> None:
    error = refusal(server, "/v1/completions", prompt="a" * 9 * MAX_MODEL_LEN)
    assert error["code"] == "context_length_exceeded"


def ids_of(server: Server, data: bytes) -> list[int]:
    tokenizer = server.served.tokenizer
    ids = {tokenizer.token_bytes.of(token_id): token_id for token_id in range(256)}
    return [ids[bytes([byte])] for byte in data]


@pytest.mark.parametrize("data", [b"broken: \xef\xbf\xbd", b"half \xe6\x97", b"\xf0", b"\n", b"\xff", b"x \xed\xa0"])
@pytest.mark.parametrize("as_text", [True, False])
def test_an_echo_and_its_answer_are_the_text_of_all_tokens(server: Server, data: bytes, as_text: bool) -> None:
    ids = ids_of(server, data)
    if as_text and b"\xef\xbf\xbd" not in data:
        pytest.skip("it is not text")
    prompt = data.decode() if as_text else ids
    answer = server.generate({"prompt_token_ids": ids}, max_tokens=6, temperature=0).outputs[0]
    whole = server.served.tokenizer.decode(ids + answer.token_ids)
    before = server.served.tokenizer.decode(ids)
    assert before + answer.text == whole  # no answer here completes a character
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0}
    assert post(server, "/v1/completions", **body).json()["choices"][0]["text"] == answer.text
    assert post(server, "/v1/completions", **body, echo=True).json()["choices"][0]["text"] == whole
    events = streamed(server, "/v1/completions", **body, echo=True)
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == whole
    alone = post(server, "/v1/completions", prompt=prompt, echo=True, max_tokens=0).json()
    assert alone["choices"][0]["text"] == before


def logprobs_of(token: int) -> dict[int, Logprob]:
    return {(token + rank) % 256: Logprob(-0.5 * rank, rank + 1, f'{token}"content":[]') for rank in range(3)}


@pytest.mark.parametrize("num_tokens", [0, 1, PART, 2 * PART + 1])
def test_an_answer_written_in_parts_is_that_written_at_once(server: Server, num_tokens: int) -> None:
    ids = [(7 * number) % 256 for number in range(num_tokens)]
    entries = [logprobs_of(token) for token in ids]

    def answer(*logprobs: ChatLogprobs) -> ChatCompletion:
        message = AnswerMessage(role="assistant", content='"content":[] \n é')
        choices = [
            ChatChoice(
                index=index, message=message, logprobs=each, finish_reason="stop", stop_reason=None, token_ids=None
            )
            for index, each in enumerate(logprobs)
        ]
        usage = Usage(
            prompt_tokens=1,
            completion_tokens=1,
            total_tokens=2,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        )
        return ChatCompletion(
            id="a",
            object="chat.completion",
            created=1,
            model="m",
            choices=choices,
            usage=usage,
            prompt_logprobs=None,
            prompt_token_ids=None,
            service_tier=None,
        )

    def some(part: slice) -> ChatLogprobs:
        return chat_logprobs(ids[part], entries[part], 2, server.served.tokenizer, skip_special_tokens=True)

    whole = some(slice(None))
    empty = ChatLogprobs(content=[])
    contents = [[some(part) for part in parts(num_tokens)] for _ in range(2)]
    expected = answer(whole, whole).model_dump_json(exclude_unset=True)
    assert written(answer(empty, empty), contents).decode() == expected


def test_a_large_answer_is_what_a_stream_has(tiny: Server) -> None:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 200, "ignore_eos": True}
    body |= {"logprobs": True, "top_logprobs": 20, "temperature": 0}
    (choice,) = post(tiny, "/v1/chat/completions", **body).json()["choices"]
    assert len(choice["logprobs"]["content"]) * 21 > SMALL
    events = streamed(tiny, "/v1/chat/completions", **body)
    contents = [event["choices"][0]["logprobs"]["content"] for event in events if event["choices"]]
    assert choice["logprobs"]["content"] == [token for content in contents for token in content]
