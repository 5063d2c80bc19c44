"""The demo model on a real local Ray Serve, on two ranks, as OpenAI's own client sees it, blocking and asyncio."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI

from support.ray_serve import deploy

pytestmark = [pytest.mark.slow, pytest.mark.engine]

OPTIONS: dict[str, Any] = {
    "tensor_parallel_size": 2,
    "device": "cpu",
    "cpus_per_rank": 0.1,
    "threads_per_rank": 1,
    "kv_cache_bytes": 60_000_000,
    "max_model_len": 256,
    "served_model_name": "demo",
}
CHAT: dict[str, Any] = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
    "max_completion_tokens": 30,
}
TEXT: dict[str, Any] = {"model": "demo", "prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}
DRAWN = [TEXT | {"temperature": 1, "seed": seed} for seed in range(4)]


@pytest.fixture(scope="module")
def url(serve_url: str, demo_model_dir: Path) -> str:
    deploy(demo_model_dir, OPTIONS)
    return f"{serve_url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_the_blocking_client_gets_the_answer_whole_and_in_pieces(client: OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT).choices[0].message.content
    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(**CHAT, stream=True)
        if chunk.choices
    ]
    assert whole is not None
    assert "Paris" in whole
    assert "".join(pieces) == whole
    assert len(pieces) > 3
    assert "Paris" in client.completions.create(**TEXT).choices[0].text


async def test_the_asyncio_client_gets_many_answers_at_once_as_the_blocking_one_gets_each(
    url: str, client: OpenAI
) -> None:
    """Greedy and drawn, whole and streamed, all side by side."""
    expected = [client.completions.create(**asked).choices[0].text for asked in [TEXT, *DRAWN]]
    assert len(set(expected)) > 2
    async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as many:

        async def whole(asked: dict[str, Any]) -> str:
            answer = await many.completions.create(**asked)
            text: str = answer.choices[0].text
            return text

        async def streamed(asked: dict[str, Any]) -> str:
            stream = await many.completions.create(**asked, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        ways = [way(asked) for way in (whole, streamed) for asked in [TEXT, *DRAWN]]
        assert await asyncio.gather(*ways) == expected * 2
