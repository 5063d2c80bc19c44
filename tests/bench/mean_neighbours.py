"""What one client's requests cost another: a 2-token request by itself, and while each mean request runs.

A tiny model on CPU behind `eagleray serve`. For each row the mean clients, in a process of their own, send their
request again and again, and the neighbour one after the other. Prints one JSON object: for each row the neighbour's
median as a multiple of its quiet one, its worst time in seconds, its answers, and the mean clients' own outcomes.

Usage: python tests/bench/mean_neighbours.py [--seconds 8] [--clients 4] [--rows B1 B8 …]
"""

import argparse
import json
import multiprocessing
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from eagleray.deploy.bench.environment import hardware, versions
from support.served_command import ServedCommand
from support.tiny_model import CHAT_TEMPLATE, write_tiny_model, write_tokenizer

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
LONG: dict[str, Any] = {"prompt": "a", "max_tokens": 4000, "ignore_eos": True}
FAR = "{% for i in range(far or 0) %}{% for j in range(far) %}{% endfor %}{% endfor %}{{ 'a' * (times or 0) }}"
MESSAGES = [{"role": "user", "content": "Hello"}]
PATIENCE_S = 120.0
SLOW_READERS = 32


def template(**variables: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": variables}


ROWS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
    "the least that clients cost": lambda: ("/v1/nothing", {}),
    "B1 64 stop texts of 3,900 characters": lambda: (
        COMPLETIONS,
        LONG | {"n": 64, "stop": [f"{number:02}" + "a" * 3900 for number in range(64)]},
    ),
    "B1 stop texts as long as they may be": lambda: (
        COMPLETIONS,
        LONG | {"n": 64, "stop": ["a" * 240 + chr(200 + number) for number in range(64)]},
    ),
    "B2 bytes that are not characters": lambda: (COMPLETIONS, LONG | {"allowed_token_ids": [200, 201], "stream": True}),
    "B3 4,096 sequences": lambda: (COMPLETIONS, LONG | {"n": 4096}),
    "B3 64 sequences": lambda: (COMPLETIONS, LONG | {"n": 64}),
    "B4 a priority": lambda: (COMPLETIONS, LONG | {"n": 16, "priority": -2147483647}),
    "B5 a long prompt": lambda: (COMPLETIONS, {"prompt": "ab " * 1300, "max_tokens": 1}),
    "B6 16 MB to count": lambda: ("/tokenize", {"prompt": "hello " * 2_600_000}),
    "B6 what may be counted": lambda: ("/tokenize", {"prompt": "hello " * 83_000}),
    "B6 15 MB to read": lambda: ("/detokenize", {"tokens": [65] * 3_700_000}),
    "B7 streams that are left": lambda: (COMPLETIONS, LONG | {"stream": True, "n": 16, "leave": True}),
    "B8 a template that counts far": lambda: template(far=100_000),
    "B8 a template that writes much": lambda: template(times=10**9),
    "B10 ids of a lone byte": lambda: (COMPLETIONS, LONG | {"prompt": [200], "max_tokens": 100}),
    "B log-probabilities": lambda: (COMPLETIONS, LONG | {"logprobs": 20, "n": 11}),
    "B whole answers with log-probabilities": lambda: (
        CHAT,
        {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20, "n": 16, "max_tokens": 100, "ignore_eos": True},
    ),
}


def send(client: httpx.Client, path: str, body: dict[str, Any], content: bytes) -> int:
    """A mean request, to its end or, if it says so, until it is left."""
    headers = {"content-type": "application/json"}
    with client.stream("POST", path, content=content, headers=headers) as answer:
        for number, _ in enumerate(answer.iter_raw()):
            if body.get("leave") and number == 5:
                break
        return answer.status_code


def mean(url: str, name: str, num_clients: int, outcomes: "Queue[str]", began: Event) -> None:
    path, body = ROWS[name]()
    content = json.dumps({key: value for key, value in body.items() if key != "leave"}).encode()

    def work() -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
            while True:
                try:
                    outcomes.put(str(send(client, path, body, content)))
                except httpx.HTTPError as error:
                    outcomes.put(type(error).__name__)

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    began.set()


def neighbour(url: str, seconds: float) -> list[float]:
    """Times of 2-token requests, one after the other."""
    times: list[float] = []
    body = {"prompt": "Hi", "max_tokens": 2, "temperature": 0, "ignore_eos": True}
    with httpx.Client(base_url=url, timeout=PATIENCE_S, trust_env=False) as client:
        end = time.monotonic() + seconds
        while time.monotonic() < end or not times:
            begin = time.monotonic()
            client.post(COMPLETIONS, json=body).raise_for_status()
            times.append(time.monotonic() - begin)
            time.sleep(0.02)
    return times


def slow_readers(server: ServedCommand, seconds: float) -> dict[str, float]:
    """Megabytes that a client adds who reads a byte a second of a long answer: to the replica, and to all of them."""

    def megabytes() -> dict[str, float]:
        found = {"replica": server.named("replica"), "all": server.family()}
        return {name: sum(rss(each) for each in processes) / 1e6 for name, processes in found.items()}

    before = megabytes()
    body = json.dumps(LONG | {"stream": True, "logprobs": 5}).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    readers = []
    for _ in range(SLOW_READERS):
        reader = socket.socket()
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        reader.connect(("127.0.0.1", server.port))
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        reader.setblocking(False)
        readers.append(reader)
    most: Counter[str] = Counter()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
        for reader in readers:
            with suppress(BlockingIOError):
                reader.recv(1)
        most |= Counter(megabytes())
    for reader in readers:
        reader.close()
    return {f"{name}_added_mb_a_reader": round((most[name] - before[name]) / SLOW_READERS, 2) for name in before}


def rss(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of rows' names; all if not given")
    settings = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder, "model"))
        write_tokenizer(model, CHAT_TEMPLATE + FAR)
        with ServedCommand(model) as server:
            server.wait_until_it_answers()
            neighbour(server.url, 2)
            quiet = neighbour(server.url, settings.seconds)
            figures["quiet"] = {"median_ms": round(median(quiet) * 1e3, 1), "worst_s": round(max(quiet), 3)}
            for name in (name for name in ROWS if name.startswith(tuple(settings.rows))):
                figures[name] = measured(server.url, name, median(quiet), settings)
                print(name, figures[name], file=sys.stderr, flush=True)
            if "slow readers".startswith(tuple(settings.rows)):
                figures["slow readers"] = slow_readers(server, 60)
    print(json.dumps(figures | {"settings": vars(settings), "versions": versions(), "hardware": hardware()}))


def measured(url: str, name: str, quiet_s: float, settings: argparse.Namespace) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    outcomes: Queue[str] = context.Queue()
    began = context.Event()
    process = context.Process(target=mean, args=(url, name, settings.clients, outcomes, began))
    process.start()
    try:
        assert began.wait(PATIENCE_S), "the mean clients did not start"
        time.sleep(1.0)  # their requests get going
        times = neighbour(url, settings.seconds)
    finally:
        psutil.Process(process.pid).kill()
        process.join()
    seen: Counter[str] = Counter()
    while not outcomes.empty():
        seen[outcomes.get()] += 1
    neighbour(url, 1)  # what was left is over
    ratio = round(median(times) / quiet_s, 2)
    return {"median_ratio": ratio, "worst_s": round(max(times), 3), "answers": len(times), "mean_outcomes": dict(seen)}


if __name__ == "__main__":
    main()
