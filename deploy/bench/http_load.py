"""Sends requests to a server with OpenAI's API when they are due, and records when the parts of each answer arrive."""

import asyncio
import ipaddress
import json
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from eagleray.deploy.bench.metrics import RequestTimes
from eagleray.deploy.bench.sse import Failure, answer_of, error_message

SPARE_FILES = 256  # that are open beside the connections


@dataclass(frozen=True, slots=True)
class Ask:
    """A request's body, to be sent `due` seconds after the start."""

    body: Mapping[str, Any]
    due: float = 0.0


@dataclass(frozen=True, slots=True)
class Exchange:
    """What became of one request; seconds on the clock of `time.monotonic()`."""

    times: RequestTimes  # where `error` is the kind of failure
    sent: float
    num_events: int = 0  # with news of the answer; an event may hold several tokens
    message: str = ""  # what the server or the network said of the failure


def is_here(url: str) -> bool:
    """Whether the URL leads to this machine by its loopback address."""
    host = httpx.URL(url).host
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class HttpLoad:
    """One client for all requests, each with a connection of its own. A request fails after `timeout_s` of silence."""

    def __init__(self, url: str, headers: Mapping[str, str], timeout_s: float, max_concurrency: int | None) -> None:
        self._url = url
        self._headers = {"content-type": "application/json", "accept-encoding": "identity", **headers}
        self._timeout_s = timeout_s
        self._max_concurrency = max_concurrency

    async def measure(self, asks: Sequence[Ask], on_end: Callable[[int], None] = lambda _: None) -> list[Exchange]:
        """Send every request when it is due, in the order of their due times, and wait for all to end.

        Where all `max_concurrency` requests are taken, the next is due only when one of them ends. Raises `ValueError`
        if the system allows too few connections.
        """
        most = min(self._max_concurrency or len(asks), len(asks))
        _allow_files(most + SPARE_FILES)
        contents = [json.dumps(ask.body).encode() for ask in asks]
        room, tasks = asyncio.Semaphore(most), []

        def ended(_: asyncio.Task[Exchange]) -> None:
            room.release()
            on_end(1)

        no_limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with (
            httpx.AsyncClient(
                headers=self._headers,
                timeout=self._timeout_s,
                limits=no_limits,
                trust_env=not is_here(self._url),  # a proxy that the environment names is for other machines
            ) as client,
            asyncio.TaskGroup() as group,
        ):
            start = had_room = time.monotonic()
            for ask, content in zip(asks, contents, strict=True):
                await asyncio.sleep(max(0.0, start + ask.due - time.monotonic()))
                if room.locked():
                    await room.acquire()
                    had_room = time.monotonic()
                else:
                    await room.acquire()
                task = group.create_task(self._exchange(client, content, max(start + ask.due, had_room)))
                task.add_done_callback(ended)
                tasks.append(task)
        return [task.result() for task in tasks]

    async def _exchange(self, client: httpx.AsyncClient, content: bytes, due: float) -> Exchange:
        sent = time.monotonic()
        try:
            answer = answer_of(await self._events(client, content))
        except Failure as failure:
            times = RequestTimes(due=due, num_input_tokens=0, error=failure.kind)
            return Exchange(times, sent, message=failure.message)
        times = RequestTimes(due=due, num_input_tokens=answer.num_input_tokens, tokens=answer.token_times)
        return Exchange(times, sent, answer.num_events)

    async def _events(self, client: httpx.AsyncClient, content: bytes) -> list[tuple[float, bytes]]:
        """What came after `data:`, and when. It is read later: JSON must not keep what comes next waiting."""
        events, rest = [], b""
        try:
            async with client.stream("POST", self._url, content=content) as response:
                if response.status_code != 200:
                    raise Failure(f"HTTP {response.status_code}", error_message(await response.aread()))
                async for piece in response.aiter_raw():
                    now = time.monotonic()
                    *lines, rest = (rest + piece).split(b"\n")
                    events += [(now, line[5:].strip()) for line in lines if line.startswith(b"data:")]
        except httpx.HTTPError as error:
            raise Failure(type(error).__name__, str(error)) from error
        return events


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise ValueError(
            f"{count - SPARE_FILES} requests at once need {count} open files, but the system allows {hard}; "
            f"give --max-concurrency {max(hard - SPARE_FILES, 1)}, or raise `ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
