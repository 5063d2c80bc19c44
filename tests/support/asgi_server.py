"""Any ASGI app behind a real server, on a port of its own."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

PATIENCE_S = 30.0


class AsgiServer:
    """uvicorn with an event loop of its own, in a thread of this process."""

    def __init__(self, app: ASGIApp, on_end: Callable[[], None]) -> None:
        config = uvicorn.Config(app, port=0, log_level="warning", lifespan="off", timeout_graceful_shutdown=5)
        self._server = uvicorn.Server(config)
        self._on_end = on_end
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),), name="server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + PATIENCE_S
        while not self._server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    async def _run(self) -> None:
        await self._server.serve()
        self._on_end()

    def stop(self) -> None:
        """Wait for the end of requests, and of the thread."""
        self._server.should_exit = True
        self._thread.join(PATIENCE_S)


@contextmanager
def asgi_server(app: ASGIApp, on_end: Callable[[], None] = lambda: None) -> Iterator[str]:
    """The server's address; `on_end` runs on its event loop at the end."""
    server = AsgiServer(app, on_end)
    try:
        yield server.url
    finally:
        server.stop()
