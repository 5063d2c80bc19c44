"""Clients that go away leave nothing running behind them."""

import asyncio
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from support.http_client import post
from support.http_server import Server, serving
from support.local_engine import LocalEngine

PATHS = {
    "/v1/completions": {"prompt": "On and on", "ignore_eos": True},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True},
}


async def test_half_of_forty_streams_dropped_at_random_leave_nothing(tiny: Server) -> None:
    """The others are whole, though 8 run at once and the rest wait."""
    body = {"max_tokens": 60, "seed": 1, "stream": True} | PATHS["/v1/completions"]
    expected = post(tiny, "/v1/completions", **body | {"stream": False})["choices"][0]["text"]
    chance = random.Random(0)
    limits = [chance.randrange(8) if number % 2 else None for number in range(40)]
    client = tiny.async_openai()

    async def run(limit: int | None) -> str:
        extra = {"ignore_eos": True}
        create = client.completions.create(
            model="tiny", prompt="On and on", max_tokens=60, seed=1, stream=True, extra_body=extra
        )
        if limit == 0:  # gone before the first event
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(create, 0.01)
            return ""
        text, num_chunks = "", 0
        async with await create as stream:
            async for chunk in stream:
                text += chunk.choices[0].text
                num_chunks += 1
                if num_chunks == limit:
                    break
        return text

    texts = await asyncio.gather(*map(run, limits))
    for text, limit in zip(texts, limits, strict=True):
        assert text == expected if limit is None else expected.startswith(text)
    await asyncio.to_thread(tiny.wait_until, tiny.is_idle)


@pytest.fixture
def local(demo_tokenizer: Tokenizer) -> Iterator[tuple[Server, LocalEngine]]:
    """A server over an engine in this process, whose steps can be counted."""
    engine = LocalEngine()
    limits = ModelLimits(max_model_len=1500, vocab_size=49_152, eos_token_ids=frozenset({2}))
    front_end = FrontEnd(demo_tokenizer, limits)
    with serving(AsyncClient(engine, front_end), "local", 1500) as server:
        yield server, engine


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("path", PATHS)
async def test_a_request_ends_when_its_client_goes_away(
    local: tuple[Server, LocalEngine], path: str, stream: bool, prompts: int
) -> None:
    server, engine = local
    body: dict[str, Any] = PATHS[path] | {"stream": stream, "max_tokens": 1400, "n": prompts}
    if path == "/v1/completions":
        body |= {"prompt": ["On and on"] * prompts, "n": 1}
    async with httpx.AsyncClient() as client:
        asking = asyncio.create_task(_read(client, server.url + path, body))
        await asyncio.to_thread(server.wait_until, lambda: engine.scheduler.num_unfinished == prompts)
        await asyncio.to_thread(server.wait_until, lambda: engine.rank.num_tokens_run > 40 * prompts)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.to_thread(server.wait_until, lambda: engine.scheduler.num_unfinished == 0)
    assert engine.rank.num_tokens_run < 1400 * prompts, "it ran to its end"
    await asyncio.to_thread(server.wait_until, server.is_idle)


async def _read(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> None:
    async with client.stream("POST", url, json=body, timeout=60) as answer:
        async for _ in answer.aiter_bytes():
            pass


async def test_a_slow_reader_gets_all_of_it_and_holds_nobody_up(local: tuple[Server, LocalEngine]) -> None:
    """It gets several steps in one event then, and memory stays bounded."""
    server, _ = local
    body = {"prompt": "On and on", "max_tokens": 1000, "ignore_eos": True, "stream": True}
    client = server.async_openai()
    stream = await client.completions.create(
        model="local", prompt="On and on", max_tokens=1000, stream=True, extra_body={"ignore_eos": True}
    )
    first = await anext(aiter(stream))
    whole = await asyncio.to_thread(post, server, "/v1/completions", **body | {"stream": False})
    text = first.choices[0].text + "".join([chunk.choices[0].text async for chunk in stream])
    assert text == whole["choices"][0]["text"]


async def test_the_engine_is_seen_to_be_idle_once_the_only_client_has_gone(tiny: Server) -> None:
    for num_events in range(1, 9):
        create = tiny.async_openai().completions.create(
            model="tiny", prompt="On and on", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        async with await create as stream:
            for _ in range(num_events):
                await anext(aiter(stream))
        await asyncio.to_thread(tiny.wait_until, tiny.is_idle)
