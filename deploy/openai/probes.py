"""`/health` and `/metrics`, for those who watch a server. They need no API key and never queue."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.cluster.errors import EngineDeadError
from eagleray.deploy.openai.admission import route_path
from eagleray.deploy.openai.errors import as_api_error
from eagleray.deploy.openai.refusal import answer, refuse

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Probes:
    """Health is 200 unless `check` raises, and 503 with its words then; metrics are whatever `metrics` gives."""

    def __init__(self, app: ASGIApp, check: Callable[[], None], metrics: Callable[[], bytes]) -> None:
        self._app = app
        self._check = check
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        match scope["type"], scope.get("method"), route_path(scope) if scope["type"] == "http" else "":
            case "http", "GET" | "HEAD", "/health":
                await self._health(send)
            case "http", "GET", "/metrics":
                await answer(send, 200, self._metrics(), METRICS_TYPE)
            case _:
                await self._app(scope, receive, send)

    async def _health(self, send: Send) -> None:
        try:
            self._check()
        except EngineDeadError as error:
            await refuse(send, as_api_error(error))
        else:
            await answer(send, 200, b"", "text/plain")
