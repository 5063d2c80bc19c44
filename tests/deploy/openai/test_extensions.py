"""What clients of vLLM ask for beyond OpenAI's API, under vLLM's names and with its meanings."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from eagleray.cluster.outputs import Logprob
from support.http_client import post, streamed
from support.http_server import Server
from support.tiny_model import CHAT_TEMPLATE, END, START

PROMPT = "To be, or not to be"
MESSAGES = [{"role": "user", "content": "Hello"}]
CHAT_PROMPT = "<|start|>user\nHello<|end|>\n<|start|>assistant\n"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": PROMPT}, CHATS: {"messages": MESSAGES}}
TEXTS = {COMPLETIONS: PROMPT, CHATS: CHAT_PROMPT}


def get(server: Server, path: str) -> dict[str, Any]:
    answer = httpx.get(server.url + path)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [1, 2])
def test_token_ids_come_with_the_text(tiny: Server, path: str, n: int) -> None:
    params = GREEDY | {"temperature": 1.0, "seed": 3, "n": n}
    direct = tiny.generate(TEXTS[path], **params)
    body = BODIES[path] | params | {"return_token_ids": True}
    whole = post(tiny, path, **body)
    prompts = [whole["prompt_token_ids"]] if path == CHATS else [c["prompt_token_ids"] for c in whole["choices"]]
    assert prompts == [direct.prompt_token_ids] * len(prompts)
    assert [choice["token_ids"] for choice in whole["choices"]] == [each.token_ids for each in direct.outputs]

    found: dict[int, list[int]] = {}
    chunks = streamed(tiny, path, **body)
    for chunk in chunks:
        (choice,) = chunk["choices"]
        is_first = choice["index"] not in found
        place = chunk if path == CHATS else choice
        assert place.get("prompt_token_ids") == (direct.prompt_token_ids if is_first else None)
        found[choice["index"]] = found.get(choice["index"], []) + choice["token_ids"]
    assert found == {each.index: each.token_ids for each in direct.outputs}


@pytest.mark.parametrize("asked", [{}, {"return_token_ids": None}, {"return_token_ids": False}])
def test_token_ids_are_left_out_unless_asked_for(tiny: Server, asked: dict[str, Any]) -> None:
    for path, body in BODIES.items():
        text = json.dumps(
            [post(tiny, path, **body, **GREEDY, **asked), *streamed(tiny, path, **body, **GREEDY, **asked)]
        )
        assert "token_ids" not in text


def test_an_echo_alone_has_no_new_token_ids(tiny: Server) -> None:
    body = {"prompt": PROMPT, "echo": True, "max_tokens": 0, "return_token_ids": True}
    (choice,) = post(tiny, COMPLETIONS, **body)["choices"]
    assert (choice["token_ids"], len(choice["prompt_token_ids"])) == ([], len(PROMPT))


def test_tokens_can_be_told_as_ids(tiny: Server) -> None:
    """Which are whole where their texts are halves of characters."""
    direct = tiny.generate(PROMPT, **GREEDY).outputs[0]
    named = [f"token_id:{token_id}" for token_id in direct.token_ids]
    asked = GREEDY | {"return_tokens_as_token_ids": True}
    found = post(tiny, COMPLETIONS, prompt=PROMPT, logprobs=3, echo=True, **asked)["choices"][0]["logprobs"]
    prompt_ids = post(tiny, "/tokenize", prompt=PROMPT)["tokens"]
    assert found["tokens"] == [f"token_id:{token_id}" for token_id in prompt_ids] + named
    for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:], strict=True):
        assert token in top
        assert all(other.startswith("token_id:") for other in top)
        assert len(top) in (3, 4)
    chat = post(tiny, CHATS, messages=MESSAGES, logprobs=True, top_logprobs=2, return_token_ids=True, **asked)
    (choice,) = chat["choices"]
    content = choice["logprobs"]["content"]
    assert [each["token"] for each in content] == [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert all(top["token"].startswith("token_id:") for each in content for top in each["top_logprobs"])


def as_json(entry: dict[int, Logprob] | None) -> dict[str, Any] | None:
    if entry is None:
        return None
    return {
        str(token_id): {
            "logprob": pytest.approx(each.logprob, abs=1e-4),
            "rank": each.rank,
            "decoded_token": each.decoded_token,
        }
        for token_id, each in entry.items()
    }


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_top", [0, 2])
def test_prompts_have_log_probabilities(tiny: Server, path: str, num_top: int) -> None:
    direct = tiny.generate(TEXTS[path], **GREEDY, prompt_logprobs=num_top)
    whole = post(tiny, path, **BODIES[path], **GREEDY, prompt_logprobs=num_top)
    found = (whole if path == CHATS else whole["choices"][0])["prompt_logprobs"]
    assert direct.prompt_logprobs is not None
    assert found == [as_json(entry) for entry in direct.prompt_logprobs]
    plain = post(tiny, path, **BODIES[path], **GREEDY)
    assert (plain if path == CHATS else plain["choices"][0])["prompt_logprobs"] is None
    answer = httpx.post(tiny.url + path, json=BODIES[path] | {"stream": True, "prompt_logprobs": num_top})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "prompt_logprobs")


def test_an_echo_and_the_prompt_may_have_unequal_numbers_of_likely_tokens(tiny: Server) -> None:
    for echoed, prompt in ((1, 4), (4, 1)):
        body = {"prompt": PROMPT, "echo": True, "logprobs": echoed, "prompt_logprobs": prompt, "max_tokens": 1}
        (choice,) = post(tiny, COMPLETIONS, **body)["choices"]
        for top in choice["logprobs"]["top_logprobs"][1:]:
            assert echoed <= len(top) <= echoed + 1
        for entry in choice["prompt_logprobs"][1:]:
            assert prompt <= len(entry) <= prompt + 1


def test_the_end_of_a_long_prompt_can_be_taken(tiny: Server) -> None:
    ids = post(tiny, "/tokenize", prompt=PROMPT)["tokens"]
    for most in (1, 5, len(ids), 300):
        expected = tiny.generate(ids[-most:], **GREEDY).outputs[0].text
        for prompt in (PROMPT, ids, [PROMPT], [ids]):
            answer = post(tiny, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=most, **GREEDY)
            assert answer["choices"][0]["text"] == expected
            assert answer["usage"]["prompt_tokens"] == min(most, len(ids))
    echoed = post(tiny, COMPLETIONS, prompt=PROMPT, truncate_prompt_tokens=5, echo=True, **GREEDY)
    assert echoed["choices"][0]["text"].startswith("to be")
    chat = post(tiny, CHATS, messages=MESSAGES, truncate_prompt_tokens=12, **GREEDY)
    assert (
        chat["choices"][0]["message"]["content"]
        == tiny.generate(tiny.generate(CHAT_PROMPT, **GREEDY).prompt_token_ids[-12:], **GREEDY).outputs[0].text
    )


@pytest.mark.parametrize("prompt", [[65] * 5000, "a" * 505])
def test_as_much_of_a_prompt_as_fits_can_be_taken(tiny: Server, prompt: Any) -> None:
    size = tiny.served.max_model_len
    answer = post(tiny, COMPLETIONS, prompt=prompt, truncate_prompt_tokens=-1, max_tokens=9, ignore_eos=True)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["total_tokens"]) == (size - 9, size)
    long = {"messages": [{"role": "user", "content": "a" * 600}], "truncate_prompt_tokens": -1, "max_tokens": 9}
    assert post(tiny, CHATS, **long, ignore_eos=True)["usage"]["prompt_tokens"] == size - 9


def test_what_is_echoed_of_a_long_prompt_is_what_the_model_saw(tiny: Server) -> None:
    asked = {"prompt": "ab" * 2000, "truncate_prompt_tokens": -1, "min_tokens": 100, "return_token_ids": True}
    whole = post(tiny, "/v1/completions", **asked, echo=True, ignore_eos=True)
    (choice,) = whole["choices"]
    assert whole["usage"]["prompt_tokens"] == len(choice["prompt_token_ids"])
    assert len(choice["prompt_token_ids"]) + len(choice["token_ids"]) == tiny.served.max_model_len
    assert choice["text"].startswith("ab" * (len(choice["prompt_token_ids"]) // 2))


@pytest.mark.parametrize("wrong", [0, -2, 2**31])
def test_a_truncation_to_nothing_is_refused_by_name(tiny: Server, wrong: int) -> None:
    for path, body in BODIES.items():
        answer = httpx.post(tiny.url + path, json=body | {"truncate_prompt_tokens": wrong})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


def test_models_say_where_they_come_from_and_what_is_allowed(tiny: Server) -> None:
    (model,) = get(tiny, "/v1/models")["data"]
    assert (model["root"], model["parent"], model["max_model_len"]) == ("tiny", None, tiny.served.max_model_len)
    (permission,) = model["permission"]
    assert (permission["object"], permission["allow_sampling"], permission["allow_fine_tuning"]) == (
        "model_permission",
        True,
        False,
    )
    assert get(tiny, "/v1/models/tiny") == model


def test_tokens_are_spelt_as_in_the_vocabulary(tiny: Server) -> None:
    assert tiny.engine.tokenizer is not None
    vocabulary = {index: token for token, index in tiny.engine.tokenizer.backend.get_vocab().items()}
    for body in ({"prompt": "a b é"}, {"messages": MESSAGES}):
        found = post(tiny, "/tokenize", **body, return_token_strs=True)
        assert found["token_strs"] == [vocabulary[token_id] for token_id in found["tokens"]]
        for asked in (None, False):
            assert "token_strs" not in post(tiny, "/tokenize", **body, return_token_strs=asked)


def test_the_tokenizers_config_can_be_read(tiny: Server) -> None:
    found = get(tiny, "/tokenizer_info")
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": START, "eos_token": END}
    assert found == expected | {"chat_template": CHAT_TEMPLATE}


async def test_the_load_is_the_number_of_running_prompts(tiny: Server) -> None:
    assert get(tiny, "/load") == {"server_load": 0}
    client = tiny.async_openai()
    asked = {"ignore_eos": True}
    create = client.completions.create
    running = [
        asyncio.create_task(create(model="tiny", prompt=PROMPT, max_tokens=400, extra_body=asked)) for _ in range(3)
    ]
    await asyncio.to_thread(tiny.wait_until, lambda: tiny.engine.stats.num_running == 3)
    assert (await asyncio.to_thread(get, tiny, "/load")) == {"server_load": 3}
    await asyncio.gather(*running)


def answered(tiny: Server, path: str, **asked: Any) -> str:
    (choice,) = post(tiny, path, **BODIES[path], **asked)["choices"]
    text: str = choice["message"]["content"] if path == CHATS else choice["text"]
    return text


@pytest.mark.parametrize("path", BODIES)
def test_bad_words_are_not_in_an_answer(tiny: Server, path: str) -> None:
    """Tokens are bytes here, so that a word is many of them. Forbidden is what would come next, again and again."""
    asked = {"temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "allowed_token_ids": [*range(32, 60)]}  # letters
    words: list[str] = []
    for length in (1, 2, 4, 3, 5):
        text = answered(tiny, path, **asked, bad_words=words)
        assert not any(word in text for word in words)
        words.append(text[9 : 9 + length])
    direct = tiny.generate(TEXTS[path], **asked, bad_words=words).outputs[0].text
    assert not any(word in direct for word in words)
    assert answered(tiny, path, **asked, bad_words=words) == direct
    plain = answered(tiny, path, **asked)
    assert answered(tiny, path, **asked, bad_words=[]) == answered(tiny, path, **asked, bad_words=None) == plain


@pytest.mark.parametrize("wrong", ["a", [1], [""], ["a"] * 1025])
def test_bad_words_that_cannot_be_forbidden_are_refused_by_name(tiny: Server, wrong: Any) -> None:
    for path, body in BODIES.items():
        answer = httpx.post(tiny.url + path, json=body | {"bad_words": wrong})
        assert (answer.status_code, answer.json()["error"]["param"].partition(".")[0]) == (400, "bad_words")
