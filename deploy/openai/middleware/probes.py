"""`/health`, `/ping` and `/metrics`, for monitoring. They never queue."""

from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.cluster.errors import EngineDeadError
from eagleray.deploy.openai.errors import as_api_error
from eagleray.deploy.openai.middleware.admission import route_path
from eagleray.deploy.openai.middleware.respond import answer, refuse

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Health:
    """`/health` is 200 unless `check` raises, and 503 with its words then."""

    def __init__(self, app: ASGIApp, check: Callable[[], None]) -> None:
        self._app = app
        self._check = check

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_ping = _asks_for(scope, "/ping", ("GET", "HEAD", "POST"))  # the same under SageMaker's name
        if not (is_ping or _asks_for(scope, "/health", ("GET", "HEAD"))):
            await self._app(scope, receive, send)
            return
        try:
            self._check()
        except EngineDeadError as error:
            await refuse(send, as_api_error(error))
        else:
            await answer(send, 200, b"", "text/plain")


class Figures:
    """`/metrics` is whatever `metrics` gives."""

    def __init__(self, app: ASGIApp, metrics: Callable[[], bytes]) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if _asks_for(scope, "/metrics", ("GET",)):
            await answer(send, 200, self._metrics(), METRICS_TYPE)
        else:
            await self._app(scope, receive, send)


def _asks_for(scope: Scope, path: str, methods: tuple[str, ...]) -> bool:
    return scope["type"] == "http" and scope["method"] in methods and route_path(scope) == path
