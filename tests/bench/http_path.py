"""What a token costs between the engine core's news and the client: processor time of the serving process per token.

A link that makes so many steps a second stands in for the engine; its news go through MessagePack as real ones do.
Streams are read by a process of its own. Prints one JSON object per number of streams: tokens per second, and
microseconds of the serving process's CPU per token.

Usage: python tests/bench/http_path.py [--streams 1,32,256] [--tokens 256] [--steps 60] [--chat] [--profile FILE]
"""

import argparse
import asyncio
import cProfile
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import msgspec
import uvicorn
import uvloop
from starlette.types import ASGIApp

from eagleray.cluster.core.messages import Abort, EngineOutputs, EngineStats, RequestMessage, Submit, Tokens
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.runtime.engine_client import MAX_NEWS
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.middleware.admission import BoundedQueue
from eagleray.deploy.openai.middleware.bodies import BodyLimit
from eagleray.deploy.openai.middleware.cors import cross_origin
from eagleray.deploy.openai.middleware.playground import Playground
from eagleray.deploy.openai.middleware.probes import Figures, Health
from eagleray.deploy.openai.middleware.request_ids import RequestIds
from eagleray.deploy.openai.middleware.timing import HttpTime
from eagleray.deploy.openai.served_model import ServedModel
from eagleray.models.loading.demo_model import demo_model
from eagleray.workers.protocol.garbage import freeze_startup

MAX_MODEL_LEN, VOCAB_SIZE = 8192, 49152
TEXT = " the sea is full of rays that glide over sand, and it is deep."
PROMPT = "Tell me of rays."


class Flood:
    """A link to an engine that makes so many steps a second once all requests are there, a token each in every step."""

    def __init__(self, token_ids: Sequence[int], steps_per_s: float) -> None:
        self._token_ids, self._step_s = token_ids, 1 / steps_per_s
        self._due = 0.0  # when the next step's news arrive
        self._left: dict[int, int] = {}
        self.waits_for = 1
        self._there = asyncio.Event()
        self._decode = msgspec.msgpack.Decoder(EngineOutputs).decode

    def send(self, message: RequestMessage) -> None:
        if isinstance(message, Submit):
            for request in message.requests:
                self._left[request.id] = request.max_tokens
            if len(self._left) >= self.waits_for:
                self._there.set()
        elif isinstance(message, Abort):
            for id in message.ids:
                self._left.pop(id, None)

    def wake(self) -> None:
        """Nobody waits elsewhere."""

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        if not self._there.is_set() or not self._left:
            self._there.clear()
            return None
        outputs = []
        for id, left in list(self._left.items()):
            token = self._token_ids[left % len(self._token_ids)]
            outputs.append(Tokens(id, [token], finish_reason="length" if left == 1 else None))
            self._left[id] = left - 1
            if left == 1:
                del self._left[id]
        return self._decode(msgspec.msgpack.encode(EngineOutputs(outputs, EngineStats())))

    async def areceive(self) -> list[EngineOutputs]:
        while True:
            if not self._there.is_set():
                await self._there.wait()
                self._due = time.perf_counter()
            await asyncio.sleep(self._due - time.perf_counter())
            found: list[EngineOutputs] = []
            while len(found) < MAX_NEWS and self._due <= time.perf_counter() and (news := self.receive(0)):
                found.append(news)
                self._due += self._step_s
            if found:
                return found

    def close(self) -> None:
        """Nothing is open."""


CLIENT = """
import asyncio, sys, time
port, streams, path, body = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4].encode()
head = f"POST {path} HTTP/1.1\\r\\nHost: x\\r\\nContent-Type: application/json\\r\\n"
head = f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode()
async def one():
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    writer.write(head + body)
    events = 0
    tail = b""
    while b"[DONE]" not in tail:
        part = await reader.read(2**16)
        assert part, "the server hung up"
        events += part.count(b"data: ")
        tail = (tail + part)[-64:]
    writer.close()
    return events
async def main():
    print(sum(await asyncio.gather(*(one() for _ in range(streams)))))
asyncio.run(main())
"""


def request_body(tokens: int, chat: bool) -> tuple[str, str]:
    """Path and JSON of one request."""
    asked = {"model": "bench", "max_tokens": tokens, "stream": True, "temperature": 0}
    if chat:
        return "/v1/chat/completions", json.dumps(asked | {"messages": [{"role": "user", "content": PROMPT}]})
    return "/v1/completions", json.dumps(asked | {"prompt": PROMPT})


async def measure(arguments: argparse.Namespace, streams: int, tokenizer: Tokenizer) -> None:
    """One server, so many streams at once."""
    tokens, chat, profile = arguments.tokens, arguments.chat, arguments.profile
    link = Flood(tokenizer.encode(TEXT), arguments.steps)
    limits = ModelLimits(max_model_len=MAX_MODEL_LEN, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset())
    client = AsyncClient(link, FrontEnd(tokenizer, limits))
    served = ServedModel(client, "bench", MAX_MODEL_LEN, created=0)
    app: ASGIApp = BodyLimit(BoundedQueue(make_app(served), 4096, num_tenants=1), 2**22)
    app = HttpTime(cross_origin(RequestIds(app, reply=False), ["*"]), lambda *_: None)
    app = Health(Figures(Playground(app), lambda: b""), lambda: None)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", access_log=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    path, body = request_body(tokens, chat)

    async def streams_read(num: int) -> int:
        link.waits_for = num
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CLIENT, str(port), str(num), path, body, stdout=subprocess.PIPE
        )
        told, _ = await process.communicate()
        return int(told)

    await streams_read(1)  # what is made on first use
    freeze_startup()  # as a replica does
    profiler = cProfile.Profile() if profile else None
    begin, cpu = time.perf_counter(), time.process_time()
    if profiler:
        profiler.enable()
    events = await streams_read(streams)
    if profiler:
        profiler.disable()
        profiler.dump_stats(profile)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    total = streams * tokens
    figures = {"streams": streams, "tokens_each": tokens, "events": events, "tokens_per_s": round(total / seconds)}
    print(json.dumps(figures | {"cpu_us_per_token": round(1e6 * cpu / total, 1), "chat": chat}), flush=True)
    client.close()
    server.should_exit = True
    await serving


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", default="1,32,256")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=float, default=60.0, help="a second, of the engine")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--profile", help="a file for cProfile's statistics")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_dir(demo_model())
    for streams in map(int, arguments.streams.split(",")):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as Ray gives to a replica
            runner.run(measure(arguments, streams, tokenizer))


if __name__ == "__main__":
    main()
