"""Bodies that are too much are refused before they cost much, by name, and others are served meanwhile."""

import asyncio
import json
import threading
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from pydantic import BaseModel, field_validator
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from eagleray.cluster.sampling_params import MAX_N
from eagleray.deploy.openai import limits
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.limits import max_characters_of_a_token
from eagleray.deploy.openai.middleware.probes import Figures, Health
from eagleray.deploy.openai.request_body import LARGE, body_route
from support.http_server import Server

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BAD_PART = {"type": "image_url", "image_url": {"url": "x"}}
MANY = {  # what is sent -> what the refusal says
    "prompts": (COMPLETIONS, {"prompt": ["a"] * 3_000_000}, f"at most {MAX_N}"),
    "prompts of ids": (COMPLETIONS, {"prompt": [[1]] * 150_000}, f"at most {MAX_N}"),
    "empty prompts": (COMPLETIONS, {"prompt": [[]] * 600_000}, f"more than {limits.MAX_PARTS} lists"),
    "ids": (COMPLETIONS, {"prompt": [1] * 500_000}, "the model holds 512"),
    "characters": (COMPLETIONS, {"prompt": "ab " * 600_000}, "the model holds 512 tokens"),
    "characters of one": (COMPLETIONS, {"prompt": ["a", "ab " * 600_000]}, "the model holds 512 tokens"),
    "choices": (COMPLETIONS, {"prompt": ["abcdefgh" * 40] * 4000, "n": 2}, f"at most {MAX_N}"),
    "wrong values": (COMPLETIONS, {"temperature": [[1] * 100] * 3_000, "prompt": "a"}, "temperature is [[1, 1"),
    "fields": (COMPLETIONS, {f"field{i}": 1 for i in range(100_000)}, "the body has 100000 fields"),
    "biases": (
        COMPLETIONS,
        {"prompt": "a", "logit_bias": {str(i): "x" for i in range(100_000)}},
        "logit_bias.0 is 'x'",
    ),
    "stop ids": (COMPLETIONS, {"prompt": "a", "stop_token_ids": [1] * 1_000_000}, "there are 258"),
    "messages": (CHAT, {"messages": [{"role": "user", "content": "a"}] * 50_000}, f"at most {limits.MAX_MESSAGES}"),
    "parts": (CHAT, {"messages": [{"role": "user", "content": [BAD_PART] * 50_000}]}, f"at most {limits.MAX_MESSAGES}"),
    "bad messages": (CHAT, {"messages": [5] * 10_000, "user": "x" * 3_000_000}, "messages.0 is 5"),
    "bad parts": (CHAT, {"messages": [{"role": "user", "content": [BAD_PART] * 10_000}]}, "only parts of type text"),
    "text": (CHAT, {"messages": [{"role": "user", "content": "ab " * 300_000}]}, "900041 characters, but the model"),
    "variable": (
        CHAT,
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"mood": "ab " * 300_000}},
        "900042 characters, but the model",
    ),
}


@pytest.mark.parametrize("case", MANY)
def test_others_are_served_while_too_much_is_refused(tiny: Server, case: str) -> None:
    path, body, message = MANY[case]
    answer, num_turns = asyncio.run(_refused_beside_others(tiny, path, json.dumps(body).encode()))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    assert num_turns > MAX_OWN_TURNS


MAX_OWN_TURNS = 1  # of the event loop, while a request waits for nothing


async def _refused_beside_others(tiny: Server, path: str, body: bytes) -> tuple[httpx.Response, int]:
    """The answer, and how many turns others had on the same event loop before it was there."""
    app = Health(Figures(make_app(tiny.served), lambda: b""), lambda: None)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        asking = asyncio.create_task(client.post(path, content=body, headers=JSON))
        num_turns = 0
        while not asking.done():
            await asyncio.sleep(0)
            num_turns += 1
        assert (await client.get("/health")).status_code == 200
        return asking.result(), num_turns


class Noting(BaseModel):
    text: str

    @field_validator("text")
    @classmethod
    def note(cls, text: str) -> str:
        seen.append(threading.get_ident())
        return text


seen: list[int] = []  # the threads of validations


async def test_large_bodies_are_validated_once_and_beside_the_event_loop(tiny: Server) -> None:
    app, router = FastAPI(), APIRouter(route_class=body_route(tiny.served, generates=False))

    @router.post("/")
    async def length(body: Noting) -> int:
        return len(body.text)

    app.include_router(router)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
        for size, here in ((10, True), (LARGE, False)):
            seen.clear()
            assert (await client.post("/", json={"text": "a" * size})).json() == size
            assert [thread == threading.get_ident() for thread in seen] == [here]


@pytest.mark.parametrize("size", [10, LARGE])
def test_large_bodies_are_answered_and_refused_as_small_ones_are(tiny: Server, size: int) -> None:
    def told(path: str, **body: Any) -> Any:
        return httpx.post(tiny.url + path, json=body, timeout=60).json()

    assert told("/tokenize", prompt="a" * size)["count"] == size
    assert told("/tokenize", messages=[{"role": "user", "content": "a" * size}])["count"] > size
    assert told("/detokenize", tokens=told("/tokenize", prompt="a" * size)["tokens"])["prompt"] == "a" * size
    ids = told("/tokenize", prompt="a")["tokens"]
    assert told(COMPLETIONS, prompt="a", max_tokens=1, user="x" * size)["usage"]["total_tokens"] == 2
    assert told(COMPLETIONS, prompt=[ids] * 3, max_tokens=1, user="x" * size)["usage"]["total_tokens"] == 6
    assert told(COMPLETIONS, prompt=5, user="x" * size)["error"]["param"] == "prompt"
    assert told(COMPLETIONS, prompt="a", nonsense="x" * size)["error"]["param"] == "nonsense"
    assert told(CHAT, user="x" * size)["error"]["message"] == "messages is missing; it is required"
    broken = httpx.post(tiny.url + CHAT, content=b'{"user": "' + b"x" * size, headers=JSON, timeout=60)
    assert broken.json()["error"]["message"].startswith("the body is not valid JSON")


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (
            CHAT,
            b'{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": %b}}',
            "chat_template_kwargs",
        ),
        (COMPLETIONS, b'{"prompt": "a", "temperature": %b}', "temperature"),
        ("/tokenize", b'{"prompt": %b}', "prompt"),
        (CHAT, b"%b", None),
    ],
)
def test_what_is_nested_too_deeply_is_named(tiny: Server, path: str, body: bytes, param: str | None) -> None:
    answer = post(tiny, path, body % nested(600))
    assert answer["param"] == param
    assert answer["message"].startswith(f"{param or 'the body'} is nested too deeply")


def test_what_a_template_takes_may_be_nested(tiny: Server) -> None:
    body = b'{"max_tokens": 1, "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": %b}}'
    assert httpx.post(tiny.url + CHAT, content=body % nested(60), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("body", "headers", "message"),
    [
        (b'{"prompt": "\xff"}', {}, "the body is not UTF-8"),
        (b"\x1f\x8b\x08\x00", {}, "the body is compressed"),
        (b"{}", {"content-encoding": "br"}, "the body is compressed (content-encoding: br)"),
        (b'{"seed": %b}' % (b"9" * 5000), {}, "too many digits"),
        (b"[" * 100_000, {}, "the body is nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_told_apart(tiny: Server, body: bytes, headers: dict[str, str], message: str) -> None:
    assert message in post(tiny, COMPLETIONS, body, headers)["message"]


def test_a_part_that_is_no_text_is_told_what_may_be(tiny: Server) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, BAD_PART]}]})
    message = post(tiny, CHAT, body.encode())["message"]
    assert message == "messages.0.content has a part of type 'image_url'; only parts of type text are supported"


def post(tiny: Server, path: str, body: bytes, headers: dict[str, str] | None = None) -> dict[str, Any]:
    """The error of a refusal."""
    answer = httpx.post(tiny.url + path, content=body, headers=JSON | (headers or {}), timeout=60)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_long_texts_have_the_tokens_of_short_ones(tiny: Server) -> None:
    """Whichever way the text is encoded."""
    texts = ["Where? 🦅 ", "a", "<|start|>b"]
    assert tiny.engine.tokenizer is not None
    for text in texts:
        answer = httpx.post(tiny.url + "/tokenize", json={"prompt": text * 2000}, timeout=60).json()
        assert answer["tokens"] == tiny.engine.tokenizer.encode(text) * 2000
        back = httpx.post(tiny.url + "/detokenize", json={"tokens": answer["tokens"]}, timeout=60).json()
        assert back["prompt"] == text * 2000


def test_tokens_of_a_conversation_can_be_counted_beyond_what_the_model_holds(tiny: Server) -> None:
    body = {"messages": [{"role": "user", "content": "ab " * 2000}]}
    assert httpx.post(tiny.url + "/tokenize", json=body, timeout=60).json()["count"] > 6000


def test_the_longest_text_that_fits_is_served(tiny: Server) -> None:
    """Of the longest tokens, without one to spare."""
    answer = httpx.post(tiny.url + COMPLETIONS, json={"prompt": "<|start|>" * 511, "max_tokens": 1}, timeout=60)
    assert (answer.status_code, answer.json()["usage"]["prompt_tokens"]) == (200, 511)


def byte_level(**parts: Any) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate([*letters, "abc"])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, part in parts.items():
        setattr(backend, name, part)
    return backend


def test_a_token_has_a_bound_only_where_nothing_of_a_text_is_lost() -> None:
    assert max_characters_of_a_token(byte_level()) == 3
    assert max_characters_of_a_token(byte_level(normalizer=normalizers.NFC())) == 12
    assert max_characters_of_a_token(byte_level(normalizer=normalizers.NFKC())) is None
    assert max_characters_of_a_token(byte_level(normalizer=normalizers.Strip())) is None
    assert max_characters_of_a_token(byte_level(normalizer=normalizers.Replace("aa", "a"))) is None
    assert max_characters_of_a_token(byte_level(pre_tokenizer=pre_tokenizers.Whitespace())) is None
    swallowing = byte_level()
    swallowing.add_tokens([AddedToken("<mask>", lstrip=True)])
    assert max_characters_of_a_token(swallowing) is None
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "play": 1}, unk_token="[UNK]"))
    assert max_characters_of_a_token(words) is None
