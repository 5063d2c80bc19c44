"""Measures the time a request spends in the serving process outside the engine."""

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray.deploy.openai.middleware.admission import may_generate
from eagleray.deploy.openai.request_context import EngineTime, engine_time


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
