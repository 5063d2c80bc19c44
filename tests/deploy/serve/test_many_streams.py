"""Two hundred streams at once from a real local Ray Serve: none is lost or mixed up, those cut off leave nothing."""

import asyncio
import json
import random
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import httpx
import pytest

from support.ray_serve import deploy
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

NUM_STREAMS = 200
NUM_PROMPTS = 50  # four streams of each
PATIENCE_S = 120.0
OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "cpus_per_rank": 0.1,
    "threads_per_rank": 1,
    "kv_cache_bytes": 4_000_000,
    "served_model_name": "tiny",
    "max_num_seqs": 64,
    "max_queued_requests": NUM_STREAMS,
}
GAUGES = ("requests_running", "requests_waiting", "kv_blocks_used")
Body = dict[str, Any]
DONE = "[DONE]"
ENDLESS = 3000  # tokens
HALF = "\ufffd"


@pytest.fixture(scope="module")
def url(serve_url: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    deploy(write_tiny_model(tmp_path_factory.mktemp("tiny")), OPTIONS)
    return serve_url


@pytest.fixture(scope="module")
def alone(url: str) -> list[str]:
    """What each prompt gives by itself."""
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        answers = [client.post("/v1/completions", json=body(number)) for number in range(NUM_PROMPTS)]
    texts: list[str] = [answer.raise_for_status().json()["choices"][0]["text"] for answer in answers]
    assert len(set(texts)) > NUM_PROMPTS // 2, "streams that are alike could be mixed up unseen"
    return texts


@pytest.fixture
async def client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_S, limits=limits) as client:
        yield client


def body(number: int) -> Body:
    """Prompts and lengths differ, so that requests come and go all the time."""
    chance = random.Random(number)
    prompt = "".join(chance.choices("abcdefghij klmnop", k=chance.randrange(3, 40)))
    return {"prompt": prompt, "max_tokens": 20 + number % 17, "temperature": 0, "ignore_eos": True}


async def events(client: httpx.AsyncClient, asked: Body) -> AsyncGenerator[str, None]:
    """The data of each event, in its order."""
    async with client.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line:
                yield line.removeprefix("data: ")


async def stream(client: httpx.AsyncClient, number: int) -> str:
    """The text of a whole stream."""
    found = [event async for event in events(client, body(number))]
    assert found[-1] == DONE
    assert json.loads(found[-2])["choices"][0]["finish_reason"] == "length"
    assert len({json.loads(event)["id"] for event in found[:-1]}) == 1
    return text_of(found[:-1])


def text_of(found: list[str]) -> str:
    return "".join(json.loads(event)["choices"][0]["text"] for event in found)


async def leave(client: httpx.AsyncClient, number: int, moment: int) -> str:
    """The text that came before the client left: after so many events, or maybe before the answer began.

    Without that the request would run for much longer than all the others.
    """
    found: list[str] = []

    async def read() -> None:
        async with aclosing(events(client, body(number) | {"max_tokens": ENDLESS})) as every:
            async for event in every:
                found.append(event)
                if len(found) == moment:
                    return

    asking = asyncio.create_task(read())
    if moment <= 0:
        await asyncio.sleep(-moment / 100)
        asking.cancel()
    with suppress(asyncio.CancelledError):
        await asking
    assert DONE not in found
    return text_of(found)


async def until_idle(client: httpx.AsyncClient) -> None:
    """No request, no block, and no row that the engine has not taken back."""
    async with asyncio.timeout(PATIENCE_S):
        while any([await figure(client, name) for name in GAUGES]):
            await asyncio.sleep(0.05)


async def figure(client: httpx.AsyncClient, name: str) -> float:
    text = (await client.get("/metrics")).text
    found = re.search(rf"^eagleray_{name} (\S+)$", text, re.MULTILINE)
    assert found
    return float(found[1])


async def test_two_hundred_streams_get_what_each_gets_alone(client: httpx.AsyncClient, alone: list[str]) -> None:
    numbers = [number % NUM_PROMPTS for number in range(NUM_STREAMS)]
    before = await figure(client, "http_seconds_count")
    texts = await asyncio.gather(*(stream(client, number) for number in numbers))
    assert texts == [alone[number] for number in numbers]
    await until_idle(client)
    async with asyncio.timeout(PATIENCE_S):
        while await figure(client, "http_seconds_count") < before + NUM_STREAMS:
            await asyncio.sleep(0.05)
    assert await figure(client, "http_seconds_count") == before + NUM_STREAMS


async def test_half_of_two_hundred_leave_at_random_and_nothing_is_left_of_them(
    client: httpx.AsyncClient, alone: list[str]
) -> None:
    chance = random.Random(0)
    numbers = [number % NUM_PROMPTS for number in range(NUM_STREAMS)]
    streams = [
        leave(client, number, chance.randrange(-60, 8)) if index % 2 else stream(client, number)
        for index, number in enumerate(numbers)
    ]
    texts = await asyncio.gather(*streams)
    assert texts[::2] == [alone[number] for number in numbers[::2]]
    for text, number in zip(texts[1::2], numbers[1::2], strict=True):
        whole = alone[number].rstrip(HALF)  # a character that begins with its last token
        assert text[: len(whole)] == whole[: len(text)]
    await until_idle(client)
    again = await asyncio.gather(*(stream(client, number) for number in numbers))  # in every row
    assert again == [alone[number] for number in numbers]
    await until_idle(client)
