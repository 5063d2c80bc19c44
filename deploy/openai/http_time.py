"""What a request spends in the serving process before the engine has it and after the engine is done with it."""

import time
from collections.abc import Callable
from contextvars import ContextVar

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.cluster.outputs import RequestMetrics
from eagleray.deploy.openai.admission import may_generate


class EngineTime:
    """From the first prompt's arrival at the engine to the end of the last one."""

    def __init__(self) -> None:
        self._arrivals: list[float] = []
        self._ends: list[float] = []

    def note(self, metrics: RequestMetrics) -> None:
        """A prompt's last output; one that has not ended by itself has no end."""
        if metrics.parts is not None and metrics.finished_time is not None:
            self._arrivals.append(metrics.arrival_time)
            self._ends.append(metrics.finished_time)

    @property
    def seconds(self) -> float | None:
        """None if no prompt ended by itself."""
        return max(self._ends) - min(self._arrivals) if self._ends else None


engine_time: ContextVar[EngineTime | None] = ContextVar("engine_time", default=None)  # of the request that is answered


class HttpTime:
    """Hands `observe` the seconds that each generating request was here and not in the engine, once it is answered."""

    def __init__(self, app: ASGIApp, observe: Callable[[float], None]) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not may_generate(scope):
            await self._app(scope, receive, send)
            return
        begin = time.monotonic()
        in_engine = EngineTime()
        token = engine_time.set(in_engine)
        try:
            await self._app(scope, receive, send)
        finally:
            engine_time.reset(token)
            if in_engine.seconds is not None:
                self._observe(time.monotonic() - begin - in_engine.seconds)
