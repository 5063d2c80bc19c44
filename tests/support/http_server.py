"""An app behind a real server, on a port of its own."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import openai
import uvicorn
from starlette.types import ASGIApp

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.prompts import Prompt
from eagleray.cluster.outputs import RequestOutput
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.middleware.admission import ApiKeys, BoundedQueue
from eagleray.deploy.openai.middleware.bodies import BodyLimit
from eagleray.deploy.openai.middleware.request_ids import RequestIds
from eagleray.deploy.openai.served_model import ServedModel

T = TypeVar("T")
Wrapper = Callable[[ASGIApp], ASGIApp]
PATIENCE_S = 30.0


def bare(app: ASGIApp) -> ASGIApp:
    """Nothing around it."""
    return app


def guarded(key: str, max_body_bytes: int, max_requests: int) -> Wrapper:
    """What a replica puts around it."""
    return lambda app: RequestIds(
        ApiKeys(BodyLimit(BoundedQueue(app, max_requests), max_body_bytes), [key]), reply=True
    )


class Server:
    """uvicorn and an `AsyncClient`, with an event loop of their own in a thread of this process."""

    def __init__(self, engine: AsyncClient, model_name: str, max_model_len: int, around: Wrapper, key: str) -> None:
        self.engine = engine
        self._around, self._key = around, key
        self.served = ServedModel(engine, model_name, max_model_len, created=1_700_000_000, allow_priority=True)
        self._started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), name="server")
        self._thread.start()
        assert self._started.wait(PATIENCE_S), "the server did not start"
        self.url = f"http://127.0.0.1:{self._port}"
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=0, timeout=60)

    def async_openai(self) -> openai.AsyncOpenAI:
        """A client for the caller's event loop."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key=self._key, max_retries=0, timeout=60)

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    def generate(self, prompt: Prompt, **params: Any) -> RequestOutput:
        """The last output of the engine itself, past the server."""
        return self.on_loop(self._generate(prompt, SamplingParams(**params)))

    def wait_until(self, holds: Callable[[], bool]) -> None:
        """Wait for something that is to come about by itself, and soon."""
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, f"it never came: {self.engine.stats}"
            time.sleep(0.002)

    def is_idle(self) -> bool:
        """Whether nothing runs or waits, and no block is held."""
        stats = self.engine.stats
        return stats.num_running == stats.num_waiting == stats.num_used_blocks == 0

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)
        self.openai.close()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        config = uvicorn.Config(
            self._around(make_app(self.served)), port=0, log_level="warning", timeout_graceful_shutdown=5
        )
        self._server = uvicorn.Server(config)
        serving = asyncio.create_task(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._port = self._server.servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await serving
        self.engine.close()

    async def _generate(self, prompt: Prompt, params: SamplingParams) -> RequestOutput:
        outputs = [output async for output in self.engine.generate(prompt, params)]
        return outputs[-1]


@contextmanager
def serving(
    engine: AsyncClient, model_name: str, max_model_len: int, around: Wrapper = bare, key: str = "none"
) -> Iterator[Server]:
    """A server, and at the end neither it nor the engine. `around` puts its application into others."""
    server = Server(engine, model_name, max_model_len, around, key)
    try:
        yield server
    finally:
        server.stop()
