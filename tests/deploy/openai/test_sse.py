"""Server-sent events: each chunk is one, and chunks that come together are written together."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from pydantic import BaseModel

from eagleray.deploy.openai.sse import FULL, EventStream


class Chunk(BaseModel):
    text: str


async def batches(*given: Sequence[str]) -> AsyncGenerator[list[Chunk], None]:
    for texts in given:
        yield [Chunk(text=text) for text in texts]


def written(*given: Sequence[str]) -> list[bytes]:
    """The bodies of a stream's messages, to a client that stays."""
    bodies: list[bytes] = []

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            bodies.append(message["body"])

    async def receive() -> Any:
        await asyncio.Event().wait()

    asyncio.run(EventStream(batches(*given))({"type": "http"}, receive, send))
    return bodies


def test_chunks_that_come_together_are_one_write() -> None:
    assert written(["a", "b"], ["c"]) == [
        b'data: {"text":"a"}\n\ndata: {"text":"b"}\n\n',
        b'data: {"text":"c"}\n\n',
        b"data: [DONE]\n\n",
    ]


def test_one_write_is_not_much_longer_than_what_is_full() -> None:
    texts = [str(number) * 1000 for number in range(300)]
    bodies = written(texts)
    assert len(bodies) > len(texts) * 1000 // FULL
    assert all(len(body) < FULL + 4000 for body in bodies)
    assert b"".join(bodies).count(b"data: {") == len(texts)
