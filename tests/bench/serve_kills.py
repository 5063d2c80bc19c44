"""Kills or stops each process of `eagleray serve` under streams, and looks at what clients see and what is left over.

Prints one JSON object per case: what the clients' requests came to from then on, how long until an answer was whole
again or until the command had ended, its code and last words, zombies, and what is left once it is told to end.

Usage: python tests/bench/serve_kills.py [--times N] [--targets raylet gcs …] [--signals KILL STOP]
"""

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Self

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from support.served_command import NAMES, ServedCommand, complaints
from support.tiny_model import write_tiny_model

NUM_STREAMS = 32
ASKED = {"model": "tiny", "prompt": "a", "max_tokens": 100, "ignore_eos": True, "stream": True}
PATIENCE_S = 150.0  # until answers come again
CALM_S = 6.0  # how long streams are watched from then on


class Clients:
    """Streams, one after the other on each of so many connections; outcomes with the times at which they came."""

    def __init__(self, url: str) -> None:
        self.ends: list[tuple[float, str]] = []
        self._url = url
        self._over = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self._thread.join()

    async def _all(self) -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=PATIENCE_S, limits=limits, trust_env=False) as client:
            streams = [asyncio.create_task(self._streams(client)) for _ in range(NUM_STREAMS)]
            while not self._over:
                await asyncio.sleep(0.1)
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)

    async def _streams(self, client: httpx.AsyncClient) -> None:
        while True:
            end = await self._stream(client)
            self.ends.append((time.monotonic(), end))
            if end != "whole":
                await asyncio.sleep(0.2)

    async def _stream(self, client: httpx.AsyncClient) -> str:
        last = ""
        try:
            async with client.stream("POST", f"{self._url}/v1/completions", json=ASKED) as answer:
                if answer.status_code != 200:
                    return f"status {answer.status_code}"
                async for line in answer.aiter_lines():
                    last = line or last
        except httpx.ConnectError:
            return "refused"
        except httpx.TransportError as error:
            return f"cut, {type(error).__name__}"
        return "whole" if last == "data: [DONE]" else "error event" if '"error"' in last else "cut"


def case(command: ServedCommand, target: str, number: signal.Signals) -> dict[str, object]:
    """Send the signal to one process of that name, under streams, and wait until answers come again, or for the end."""
    with Clients(command.url) as clients:
        command.until(lambda: len([end for _, end in clients.ends if end == "whole"]) >= NUM_STREAMS, PATIENCE_S)
        victim = random.choice(command.named(target))
        before = len(complaints(command.log.read_text()))
        begin = time.monotonic()
        os.kill(victim.pid, number)
        found: dict[str, object] = {"target": target, "signal": number.name, **watched(command, clients, begin)}
    found["outcomes"] = dict(Counter(end for moment, end in clients.ends if moment > begin))
    found["said"] = complaints(command.log.read_text())[before:]
    if command.process.poll() is not None:
        found |= {"code": command.process.returncode, "left": command.left()}
    return found


def watched(command: ServedCommand, clients: Clients, begin: float) -> dict[str, object]:
    """Whether and when answers came again, or the command ended."""
    found: dict[str, object] = {}
    hit = begin + 1.0  # a stream that was whole just then had its last event on the way
    while time.monotonic() < begin + PATIENCE_S and command.process.poll() is None:
        command.family()
        again = [moment for moment, end in list(clients.ends) if moment > hit and end == "whole"]
        failed = [moment for moment, end in list(clients.ends) if moment > begin and end != "whole"]
        steady = max(failed, default=begin) + CALM_S
        if again and time.monotonic() > max(steady, hit + CALM_S):
            found["answers_again_s"] = round(min(again, key=lambda m: (m < max(failed, default=begin), m)) - begin, 1)
            gaps = sorted([begin, *again])
            found["longest_silence_s"] = round(max(later - sooner for sooner, later in pairwise(gaps)), 1)
            break
        time.sleep(0.1)
    else:
        found["hung" if command.process.poll() is None else "ended_s"] = round(time.monotonic() - begin, 1)
    return found | {"zombies": command.zombies()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--targets", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--signals", nargs="*", default=["KILL", "STOP"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder, "model"))
        command: ServedCommand | None = None
        for _ in range(arguments.times):
            for target in arguments.targets:
                for word in arguments.signals:
                    if command is None:
                        command = ServedCommand(model)
                        command.wait_until_it_answers()
                    found = case(command, target, signal.Signals[f"SIG{word}"])
                    if command.process.poll() is not None or "hung" in found:
                        command.close()
                        command = None
                    print(json.dumps(found), flush=True)
        if command is not None:
            seconds = round(command.end(), 1)
            end = {"end_s": seconds, "code": command.process.returncode, "left": command.left()}
            command.close()
            print(json.dumps(end | {"streams": NUM_STREAMS, "versions": versions(), "hardware": hardware()}))


if __name__ == "__main__":
    main()
