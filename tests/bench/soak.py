"""A server under a mix of kind and mean clients, for long: what each of its processes holds must not grow.

Prints one JSON object per look: for each kind of process the resident memory in MB, open descriptors and threads,
summed over its processes, and how many requests of each kind had which outcome until then.

Usage: python tests/bench/soak.py [--minutes 5 15 30]
"""

import argparse
import asyncio
import json
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from support.processes import command_line
from support.served_command import NAMES, ServedCommand
from support.tiny_model import write_tiny_model

NUM_KIND = 6
PATIENCE_S = 120.0
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MEAN: dict[str, Callable[[random.Random], tuple[str, Any]]] = {
    "long stop strings": lambda r: (COMPLETIONS, long_answer(r) | {"stop": ["ab" * 100 + str(i) for i in range(16)]}),
    "many sequences": lambda r: (COMPLETIONS, long_answer(r) | {"n": 64, "max_tokens": 100}),
    "no whole character": lambda r: (COMPLETIONS, long_answer(r) | {"allowed_token_ids": [128, 200]}),
    "every log-probability": lambda r: (COMPLETIONS, long_answer(r) | {"logprobs": 5, "echo": True}),
    "prompt too long": lambda r: (COMPLETIONS, {"model": "tiny", "prompt": "x" * r.randrange(5_000, 500_000)}),
    "unknown fields": lambda r: (CHAT, {"model": "tiny", f"field{r.random()}": 1, "messages": []}),
    "a model of its own": lambda r: (COMPLETIONS, {"model": f"m{r.random()}", "prompt": "a"}),
    "deep": lambda r: (COMPLETIONS, {"model": "tiny", "prompt": "a", "x": deep(200)}),
    "many biases": lambda r: (COMPLETIONS, long_answer(r) | {"logit_bias": {str(i): 1 for i in range(258)}}),
    "template": lambda r: (
        CHAT,
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a" * 2000}],
            "chat_template_kwargs": {f"name{r.random()}": "x" * 1000},
            "max_tokens": 5,
        },
    ),
    "long text to tokenize": lambda r: ("/tokenize", {"prompt": "word " * r.randrange(100_000)}),
    "many tokens to detokenize": lambda r: ("/detokenize", {"tokens": [65] * r.randrange(100_000)}),
    "no such path": lambda r: (f"/v1/{r.random()}", {}),
}


def long_answer(rng: random.Random) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "a" * rng.randrange(1, 50), "max_tokens": 400, "ignore_eos": True}


def deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


class Clients:
    """All of them, until cancelled; outcomes are counted by kind."""

    def __init__(self, server: ServedCommand, seed: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self._server = server
        self._rng = random.Random(seed)

    async def run(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with (
            httpx.AsyncClient(base_url=self._server.url, timeout=PATIENCE_S, limits=limits, trust_env=False) as client,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(NUM_KIND):
                group.create_task(self._kind(client))
            for _ in range(2):
                group.create_task(self._mean(client))
            group.create_task(self._leaving(client))
            group.create_task(self._slow())

    async def _kind(self, client: httpx.AsyncClient) -> None:
        """Chats and completions as they are meant, streamed or not; each must be whole."""
        while True:
            streams = self._rng.random() < 0.7
            body = long_answer(self._rng) | {"max_tokens": self._rng.randrange(1, 100), "stream": streams}
            with suppress(httpx.HTTPError):
                answer = await client.post(COMPLETIONS, json=body)
                whole = answer.text.endswith("data: [DONE]\n\n") if streams else answer.status_code == 200
                self.outcomes[f"kind: {'whole' if whole else answer.status_code}"] += 1
                continue
            self.outcomes["kind: broken"] += 1

    async def _mean(self, client: httpx.AsyncClient) -> None:
        while True:
            name = self._rng.choice(list(MEAN))
            path, body = MEAN[name](self._rng)
            try:
                outcome = str((await client.post(path, json=body)).status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            self.outcomes[f"{name}: {outcome}"] += 1

    async def _leaving(self, client: httpx.AsyncClient) -> None:
        """Streams that their client leaves after a few events."""
        while True:
            body = long_answer(self._rng) | {"max_tokens": 4000, "stream": True, "n": 4}
            stay = self._rng.randrange(1, 20)
            with suppress(httpx.HTTPError):
                async with client.stream("POST", COMPLETIONS, json=body) as answer:
                    async for _ in answer.aiter_lines():
                        stay -= 1
                        if stay == 0:
                            break
            self.outcomes["left"] += 1

    async def _slow(self) -> None:
        """A client that reads one byte a second of an answer that is ready long before."""
        body = json.dumps(long_answer(self._rng) | {"max_tokens": 4000, "stream": True, "logprobs": 5}).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        while True:
            with socket.socket() as slow:
                slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
                slow.connect(("127.0.0.1", self._server.port))
                slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                slow.setblocking(False)
                for _ in range(300):
                    await asyncio.sleep(1)
                    with suppress(BlockingIOError):
                        slow.recv(1)
            self.outcomes["slow"] += 1


def held(server: ServedCommand) -> dict[str, list[float]]:
    """Megabytes, descriptors and threads of each kind of process."""
    found: dict[str, list[float]] = {}
    for process in [psutil.Process(server.process.pid), *server.family()]:
        words = command_line(process)
        name = next((name for name, mark in NAMES.items() if mark in words), "others")
        with suppress(psutil.Error):
            figures = (process.memory_info().rss / 1e6, process.num_fds(), process.num_threads())
            found[name] = [round(a + b, 1) for a, b in zip(found.get(name, [0, 0, 0]), figures, strict=True)]
    return found


async def soak(server: ServedCommand, minutes: list[float], seed: int) -> None:
    clients = Clients(server, seed)
    running = asyncio.create_task(clients.run())
    begin = time.monotonic()
    for moment in sorted({0.5, *minutes}):
        done, _ = await asyncio.wait({running}, timeout=max(0.0, begin + 60 * moment - time.monotonic()))
        assert not done, running.exception()
        look = {"minutes": moment, "held": held(server), "outcomes": dict(sorted(clients.outcomes.items()))}
        print(json.dumps(look), flush=True)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, nargs="+", default=[5, 15, 30])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ServedCommand(write_tiny_model(Path(folder, "model"))) as server:
        server.wait_until_it_answers()
        asyncio.run(soak(server, arguments.minutes, arguments.seed))
        seconds = round(server.end(), 1)
        print(json.dumps({"end_s": seconds, "left": server.left(), "versions": versions(), "hardware": hardware()}))


if __name__ == "__main__":
    main()
