"""Merges several async streams into one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

T = TypeVar("T")


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[tuple[int, T], None]:
    """Items as they come, each with the number of its stream. Leaving the iteration closes all streams.

    The first failure ends it. Each stream is asked for its next item once the last was taken, so that memory stays
    bounded.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as stream:
            async for item in stream:
                yield 0, item
        return
    ready: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue(maxsize=1)
    pumps = [asyncio.create_task(_pump(number, stream, ready)) for number, stream in enumerate(streams)]
    num_open = len(pumps)
    try:
        while num_open:
            match await ready.get():
                case None:
                    num_open -= 1
                case BaseException() as error:
                    raise error
                case found:
                    yield found
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(
    number: int, stream: AsyncGenerator[T, None], ready: "asyncio.Queue[tuple[int, T] | BaseException | None]"
) -> None:
    try:
        async with aclosing(stream):
            async for item in stream:
                await ready.put((number, item))
        await ready.put(None)
    except Exception as error:
        await ready.put(error)
