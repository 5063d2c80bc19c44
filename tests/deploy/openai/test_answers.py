"""The official client gets whole and exact answers: texts, log-probabilities, usage, in every form of prompt."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from openai.types.chat import ChatCompletionMessageParam

from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import RequestOutput
from support.http_client import post, streamed
from support.http_server import Server
from support.tiny_model import SPECIAL

PROMPT = "To be, or not to be"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
CHAT_PROMPT = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"


@pytest.fixture
def ids(tiny: Server) -> list[int]:
    assert tiny.engine.tokenizer is not None
    return tiny.engine.tokenizer.encode(PROMPT)


def test_models_are_listed_and_found(tiny: Server) -> None:
    (model,) = tiny.openai.models.list()
    assert (model.id, model.object, model.created, model.owned_by) == ("tiny", "model", 1_700_000_000, "eagleray")
    assert tiny.openai.models.retrieve("tiny") == model


@pytest.mark.parametrize("model", ["tiny", "", None])
def test_a_completion_is_the_engines(tiny: Server, model: str | None) -> None:
    direct = tiny.generate(PROMPT, **GREEDY)
    extra = {"ignore_eos": True} | ({"model": None} if model is None else {})
    answer = tiny.openai.completions.create(
        model=model or "", prompt=PROMPT, temperature=0, max_tokens=12, extra_body=extra
    )
    assert (answer.object, answer.model, answer.id[:5]) == ("text_completion", "tiny", "cmpl-")
    assert [(choice.index, choice.text, choice.finish_reason) for choice in answer.choices] == [
        (0, direct.outputs[0].text, "length")
    ]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (19, 12, 31)


def test_prompts_are_texts_or_ids_or_lists_of_either(tiny: Server, ids: list[int]) -> None:
    one = tiny.generate(PROMPT, **GREEDY).outputs[0].text
    other = tiny.generate("Whether", **GREEDY).outputs[0].text
    assert tiny.engine.tokenizer is not None
    other_ids = tiny.engine.tokenizer.encode("Whether")
    expected: list[tuple[Any, list[str]]] = [
        (PROMPT, [one]),
        (ids, [one]),
        ([PROMPT], [one]),
        ([ids], [one]),
        ([PROMPT, "Whether"], [one, other]),
        ([other_ids, ids], [other, one]),
    ]
    for prompt, texts in expected:
        answer = post(tiny, "/v1/completions", prompt=prompt, **GREEDY)
        assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(texts)), prompt


def test_choices_of_several_prompts_are_numbered_through(tiny: Server) -> None:
    body = {"prompt": [PROMPT, "Whether"], "n": 2, "seed": 3, "max_tokens": 6, "ignore_eos": True}
    texts = [
        sequence.text
        for prompt in (PROMPT, "Whether")
        for sequence in tiny.generate(prompt, n=2, seed=3, max_tokens=6, ignore_eos=True).outputs
    ]
    answer = post(tiny, "/v1/completions", **body)
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(texts))
    assert answer["usage"]["prompt_tokens"] == len(PROMPT) + len("Whether"), "a prompt counts once"
    assert answer["usage"]["completion_tokens"] == 24
    streams: dict[int, str] = {}
    chunks = streamed(tiny, "/v1/completions", **body, stream_options={"include_usage": True})
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        streams[choice["index"]] = streams.get(choice["index"], "") + choice["text"]
    assert streams == dict(enumerate(texts))
    assert chunks[-1]["usage"] | {"prompt_tokens_details": None} == answer["usage"] | {"prompt_tokens_details": None}


def test_a_chat_is_put_into_the_models_template(tiny: Server) -> None:
    direct = tiny.generate(CHAT_PROMPT, temperature=0.0, max_tokens=9)
    answer = tiny.openai.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=9)
    (choice,) = answer.choices
    assert (answer.object, answer.model, answer.id[:9]) == ("chat.completion", "tiny", "chatcmpl-")
    assert (choice.message.role, choice.message.content) == ("assistant", direct.outputs[0].text)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(direct.prompt_token_ids)


CONVERSATIONS: list[tuple[dict[str, Any], str]] = [
    (
        {"messages": [{"role": "system", "content": "Be"}, {"role": "user", "content": "Hi"}]},
        "<|start|>system\nBe<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        "<|start|>user\na\nb<|end|>\n<|start|>assistant\n",
    ),
    (
        {"messages": [{"role": "user", "content": "Hi", "name": "Ann"}, MESSAGES[0] | {"name": None}]},
        "<|start|>user Ann\nHi<|end|>\n<|start|>user\nHello<|end|>\n<|start|>assistant\n",
    ),
    (
        {"messages": [{"role": "narrator", "content": "Hi"}, {"role": "tool", "content": "Ho"}]},
        "* <|start|>narrator\nHi<|end|>\n<|start|>tool\nHo<|end|>\n<|start|>assistant\n",
    ),
    ({"messages": MESSAGES, "add_generation_prompt": False}, "<|start|>user\nHello<|end|>\n"),
    ({"messages": MESSAGES, "continue_final_message": True}, "<|start|>user\nHello"),
    ({"messages": MESSAGES, "chat_template_kwargs": {"mood": "gay"}}, CHAT_PROMPT + "gay"),
]


@pytest.mark.parametrize(("body", "text"), CONVERSATIONS)
def test_a_conversation_becomes_this_text(tiny: Server, body: dict[str, Any], text: str) -> None:
    tokens = post(tiny, "/tokenize", **body)["tokens"]
    assert post(tiny, "/detokenize", tokens=tokens) == {"prompt": text}
    answer = post(tiny, "/v1/chat/completions", **body, **GREEDY)
    assert answer["choices"][0]["message"]["content"] == tiny.generate(text, **GREEDY).outputs[0].text
    assert answer["usage"]["prompt_tokens"] == len(tokens)


def test_texts_are_tokenised(tiny: Server, ids: list[int]) -> None:
    assert post(tiny, "/tokenize", prompt=PROMPT) == {"count": 19, "max_model_len": 512, "tokens": ids}
    assert post(tiny, "/tokenize", prompt="") == {"count": 0, "max_model_len": 512, "tokens": []}
    assert post(tiny, "/detokenize", tokens=ids, model="tiny") == {"prompt": PROMPT}


async def test_streams_are_whole_with_the_async_client(tiny: Server) -> None:
    client = tiny.async_openai()
    whole = await client.chat.completions.create(model="tiny", messages=MESSAGES, seed=1, max_tokens=40)
    stream = await client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=1, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [
        whole.choices[0].finish_reason
    ]
    assert {(chunk.id, chunk.object, chunk.usage) for chunk in chunks} == {(last.id, "chat.completion.chunk", None)}
    assert whole.usage is not None
    assert last.usage is not None
    assert (last.choices, last.usage.completion_tokens) == ([], whole.usage.completion_tokens)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_usage_can_grow_with_each_event_of_a_choice(tiny: Server, path: str) -> None:
    asked: dict[str, Any] = {"prompt": [PROMPT, "Hello"]}
    lengths = [len(PROMPT), len("Hello")]
    if path == "/v1/chat/completions":
        asked, lengths = {"messages": MESSAGES}, [post(tiny, "/tokenize", messages=MESSAGES)["count"]]
    body = asked | {"n": 2, "seed": 1, "max_tokens": 9, "ignore_eos": True}
    for include_usage in (True, False):
        options = {"include_usage": include_usage, "continuous_usage_stats": True}
        chunks = streamed(tiny, path, **body, stream_options=options)
        total = chunks.pop()["usage"] if include_usage else None
        seen: dict[int, list[dict[str, Any]]] = {}
        for chunk in chunks:
            seen.setdefault(chunk["choices"][0]["index"], []).append(chunk["usage"])
        for usages in seen.values():
            counts = [usage["completion_tokens"] for usage in usages]
            assert counts == sorted(set(counts))
            assert counts[-1] == 9
            assert len({usage["prompt_tokens"] for usage in usages}) == 1
            assert all(usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
        prompts = [usages[-1]["prompt_tokens"] for index, usages in sorted(seen.items()) if index % 2 == 0]
        assert prompts == lengths
        if total is not None:
            assert (total["prompt_tokens"], total["completion_tokens"]) == (sum(prompts), 9 * len(seen))


def test_usage_is_in_a_stream_only_if_asked_for(tiny: Server) -> None:
    for options in (None, {}, {"include_usage": False}):
        chunks = streamed(tiny, "/v1/completions", prompt=PROMPT, stream_options=options)
        assert not any("usage" in chunk for chunk in chunks)
        assert all(chunk["choices"] for chunk in chunks)


def test_cached_prompt_tokens_are_counted(tiny: Server) -> None:
    prompt = "A prompt of more than two blocks that nothing else has: 0123456789"
    cached = [
        post(tiny, "/v1/completions", prompt=prompt)["usage"]["prompt_tokens_details"]["cached_tokens"]
        for _ in range(2)
    ]
    assert cached == [0, 64]


def names(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [name(tokenizer, token_id) for token_id in token_ids]


def texts(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    return [tokenizer.decode([token_id], skip_special_tokens=False) for token_id in token_ids]


def name(tokenizer: Tokenizer, token_id: int) -> str:
    """The model's tokens are bytes: those beyond ASCII are not characters."""
    text = tokenizer.decode([token_id], skip_special_tokens=False)
    (byte, *_) = tokenizer.token_bytes.of(token_id) or b""
    return f"bytes:\\x{byte:02x}" if text == "\N{REPLACEMENT CHARACTER}" else text


def rounded(values: list[float | None]) -> list[float | None]:
    """Batches of other sizes may differ in the last bits of a float32."""
    return [None if value is None else round(value, 4) for value in values]


@pytest.mark.parametrize("as_stream", [False, True])
def test_logprobs_of_completions(tiny: Server, as_stream: bool) -> None:
    direct = tiny.generate(PROMPT, **GREEDY | {"temperature": 1.0, "seed": 4}, logprobs=3).outputs[0]
    body = {"prompt": PROMPT, "seed": 4, "max_tokens": 12, "ignore_eos": True, "logprobs": 3}
    found = _joined(tiny, body, as_stream)
    assert tiny.engine.tokenizer is not None
    assert direct.logprobs is not None
    assert found["tokens"] == names(tiny.engine.tokenizer, direct.token_ids)
    own = [entry[token_id].logprob for entry, token_id in zip(direct.logprobs, direct.token_ids, strict=True)]
    assert rounded(found["token_logprobs"]) == rounded([*own])
    for top, entry in zip(found["top_logprobs"], direct.logprobs, strict=True):
        assert set(top) == {*names(tiny.engine.tokenizer, [*entry])}
        assert 3 <= len(top) == len(entry) <= 4


def _joined(tiny: Server, body: dict[str, Any], as_stream: bool) -> dict[str, list[Any]]:
    if not as_stream:
        found: dict[str, list[Any]] = post(tiny, "/v1/completions", **body)["choices"][0]["logprobs"]
        return found
    parts = [chunk["choices"][0]["logprobs"] for chunk in streamed(tiny, "/v1/completions", **body)]
    return {name: [item for part in parts for item in part[name]] for name in parts[0]}


@pytest.mark.parametrize("as_stream", [False, True])
def test_an_echo_is_in_the_logprobs_too(tiny: Server, ids: list[int], as_stream: bool) -> None:
    direct = tiny.generate(PROMPT, **GREEDY, logprobs=2, prompt_logprobs=2)
    body = GREEDY | {"prompt": PROMPT, "logprobs": 2, "echo": True, "allowed_token_ids": None}
    found = _joined(tiny, body, as_stream)
    assert tiny.engine.tokenizer is not None
    assert found["tokens"] == names(tiny.engine.tokenizer, ids + direct.outputs[0].token_ids)
    assert found["text_offset"][: len(ids)] == list(range(len(ids)))
    assert rounded(found["token_logprobs"]) == rounded(_own_logprobs(direct))
    assert found["top_logprobs"][0] is None


def _own_logprobs(output: RequestOutput) -> list[float | None]:
    entries = [*(output.prompt_logprobs or []), *(output.outputs[0].logprobs or [])]
    token_ids = output.prompt_token_ids + output.outputs[0].token_ids
    return [None if e is None else e[token_id].logprob for e, token_id in zip(entries, token_ids, strict=True)]


def test_offsets_are_places_in_the_text(tiny: Server) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "seed": 2, "max_tokens": 60, "logit_bias": {}}
    ascii_only = {"allowed_token_ids": list(range(94))}
    answer = post(tiny, "/v1/completions", **body, **ascii_only)["choices"][0]
    offsets, tokens = answer["logprobs"]["text_offset"], answer["logprobs"]["tokens"]
    assert len(answer["text"]) == 19 + 60
    for offset, token in zip(offsets, tokens, strict=True):
        assert answer["text"][offset : offset + len(token)] == token


@pytest.mark.parametrize("prompt", [PROMPT, "ids"])
def test_an_echo_comes_before_the_answer(tiny: Server, ids: list[int], prompt: str) -> None:
    asked = ids if prompt == "ids" else prompt
    text = tiny.generate(PROMPT, **GREEDY).outputs[0].text
    for n, extra in ((1, GREEDY), (2, GREEDY | {"temperature": 1.0, "top_k": 1})):
        body = extra | {"prompt": asked, "echo": True, "n": n}
        answer = post(tiny, "/v1/completions", **body)
        assert [choice["text"] for choice in answer["choices"]] == [PROMPT + text] * n
        chunks = [chunk["choices"][0] for chunk in streamed(tiny, "/v1/completions", **body)]
        for index in range(n):
            assert "".join(choice["text"] for choice in chunks if choice["index"] == index) == PROMPT + text
        assert answer["usage"]["completion_tokens"] == 12 * n


def test_an_echo_alone_scores_the_prompt(tiny: Server) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 1, "temperature": 0.0}
    scored = post(tiny, "/v1/completions", max_tokens=0, **body)
    more = post(tiny, "/v1/completions", max_tokens=5, **body)
    choice = scored["choices"][0]
    assert (choice["text"], choice["finish_reason"], scored["usage"]["completion_tokens"]) == (PROMPT, "length", 0)
    assert rounded(choice["logprobs"]["token_logprobs"]) == rounded(
        more["choices"][0]["logprobs"]["token_logprobs"][: len(PROMPT)]
    )


def test_an_echo_alone_says_nothing_of_the_token_after_it(tiny: Server) -> None:
    body = {"prompt": PROMPT, "temperature": 0.0, "return_token_ids": True}
    told = post(tiny, "/v1/completions", max_tokens=1, ignore_eos=True, **body)["choices"][0]
    for stop in ({"stop": [told["text"]]}, {"stop_token_ids": told["token_ids"]}):
        alone = post(tiny, "/v1/completions", max_tokens=0, echo=True, **stop, **body)["choices"][0]
        assert (alone["finish_reason"], alone["stop_reason"], alone["token_ids"]) == ("length", None, [])


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("num_top", [0, 2])
def test_logprobs_of_chats(tiny: Server, as_stream: bool, num_top: int) -> None:
    params = {"seed": 4, "max_tokens": 12, "ignore_eos": True}
    direct = tiny.generate(CHAT_PROMPT, **params, logprobs=num_top).outputs[0]
    body = params | {"messages": MESSAGES, "logprobs": True, "top_logprobs": num_top}
    if as_stream:
        chunks = streamed(tiny, "/v1/chat/completions", **body)
        content = [entry for chunk in chunks for entry in chunk["choices"][0]["logprobs"]["content"]]
    else:
        content = post(tiny, "/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    assert tiny.engine.tokenizer is not None
    assert [entry["token"] for entry in content] == texts(tiny.engine.tokenizer, direct.token_ids)
    for entry in content:
        top = entry["top_logprobs"]
        assert len(top) == num_top
        assert top == sorted(top, key=lambda each: -each["logprob"])
        for each in [entry, *top]:
            assert len(each["bytes"]) == (0 if each["token"] in SPECIAL else 1), "each is a byte, or left out"
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace") == direct.text


def test_without_logprobs_there_are_none(tiny: Server) -> None:
    assert post(tiny, "/v1/completions", prompt=PROMPT)["choices"][0]["logprobs"] is None
    assert post(tiny, "/v1/chat/completions", messages=MESSAGES, max_tokens=2)["choices"][0]["logprobs"] is None
    assert post(tiny, "/v1/completions", prompt=PROMPT, logprobs=0)["choices"][0]["logprobs"] is not None


def test_the_version_is_the_packages(tiny: Server) -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    assert f'version = "{httpx.get(tiny.url + "/version").json()["version"]}"' in text


def test_parts_of_characters_are_tokens_of_their_own(tiny: Server) -> None:
    """As OpenAI spells them; under their text, U+FFFD, most would be lost."""
    text = "Emoji: 😀 😃"
    body = {"prompt": text, "logprobs": 5, "echo": True, "max_tokens": 0}
    choice = post(tiny, "/v1/completions", **body)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == text
    assert found["tokens"][7:11] == [r"bytes:\xf0", r"bytes:\x9f", r"bytes:\x98", r"bytes:\x80"]
    assert found["tokens"][:7] == [*"Emoji: "]
    assert found["text_offset"] == [*range(7), 7, 7, 7, 7, 8, 9, 9, 9, 9]
    assert found["top_logprobs"][0] is None
    for token, logprob, top in list(
        zip(*(found[n] for n in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert len(top) in (5, 6)
        assert top[token] == logprob
