"""The demo model behind a server: what people see who try it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray.cluster.async_llm import AsyncLLM
from support.http_client import post, streamed
from support.http_server import Server, serving

pytestmark = pytest.mark.engine

QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def demo(ray_cluster: None, demo_model_dir: Path) -> Iterator[Server]:
    engine = AsyncLLM(demo_model_dir, max_model_len=256, kv_cache_bytes=30_000_000, max_num_seqs=8, threads_per_rank=1)
    with serving(engine, "demo", 256) as server:
        yield server


def test_a_question_is_answered(demo: Server) -> None:
    answer = demo.openai.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_completion_tokens=60
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop", "the end of sequence ends it"
    assert "<|im_end|>" not in (answer.choices[0].message.content or "")


def test_a_text_is_continued(demo: Server) -> None:
    answer = demo.openai.completions.create(
        model="demo", prompt="The capital of France is", temperature=0, max_tokens=3, logprobs=2, echo=True
    )
    (choice,) = answer.choices
    assert choice.text.startswith("The capital of France is Paris")
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[:6] == ["The", " capital", " of", " France", " is", " Paris"]
    assert choice.logprobs.text_offset is not None
    assert choice.logprobs.text_offset[:6] == [0, 3, 11, 14, 21, 24]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("as_stream", [False, True])
def test_offsets_are_places_in_an_echo_that_spells_special_tokens_out(
    demo: Server, skips: bool, as_stream: bool
) -> None:
    prompt = "<|im_start|>user\nHi <|im_end|>\n"
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 4, "temperature": 0.0}
    body |= {"logit_bias": {"0": -100, "1": -100, "2": -100}, "skip_special_tokens": skips}
    if as_stream:
        choices = [chunk["choices"][0] for chunk in streamed(demo, "/v1/completions", **body)]
    else:
        choices = post(demo, "/v1/completions", **body)["choices"]
    text = "".join(choice["text"] for choice in choices)
    tokens, offsets = (
        [each for choice in choices for each in choice["logprobs"][name]] for name in ("tokens", "text_offset")
    )
    assert text.startswith(prompt)
    assert len(tokens) == 11
    for offset, token in zip(offsets, tokens, strict=True):
        assert text[offset : offset + len(token)] == token


def test_characters_of_several_tokens_come_whole(demo: Server) -> None:
    """A stream never shows half of one, and holds what the whole answer does."""
    direct = demo.generate("Emoji: 🦅🐟🦅🐟🦅🐟", temperature=0.0, max_tokens=30, ignore_eos=True).outputs[0]
    stream = demo.openai.completions.create(
        model="demo",
        prompt="Emoji: 🦅🐟🦅🐟🦅🐟",
        temperature=0,
        max_tokens=30,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    texts = [chunk.choices[0].text for chunk in stream]
    assert "".join(texts) == direct.text
    assert any(ord(letter) > 0xFFFF for letter in direct.text), "a prompt whose answer has none tests nothing"
    assert "" in texts[:-1], "tokens that end no character bring no text"


@pytest.mark.parametrize("as_stream", [False, True])
@pytest.mark.parametrize("prompt", ["Say only this: 🦅🐟🦅🐟🦅🐟🦅🐟", "Repeat: 日本語 日本語 日本語 日本語"])
def test_the_bytes_of_all_tokens_are_the_text(demo: Server, prompt: str, as_stream: bool) -> None:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt.partition(": ")[2][:5]}]
    body = {"messages": messages, "continue_final_message": True, "temperature": 0, "max_tokens": 40}
    body |= {"logprobs": True, "top_logprobs": 3}
    if as_stream:
        choices = [chunk["choices"][0] for chunk in streamed(demo, "/v1/chat/completions", **body)]
        text = "".join(choice["delta"]["content"] for choice in choices)
    else:
        choices = post(demo, "/v1/chat/completions", **body)["choices"]
        text = choices[0]["message"]["content"]
    tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
    assert b"".join(bytes(token["bytes"]) for token in tokens).decode(errors="replace") == text
    assert any("\N{REPLACEMENT CHARACTER}" in token["token"] for token in tokens), "no part of a character: no test"
    assert all(top["bytes"] is not None for token in tokens for top in token["top_logprobs"])
