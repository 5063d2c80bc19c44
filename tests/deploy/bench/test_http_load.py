"""When the load generator sends its requests, on a clock that moves only while nothing else is to be done."""

import asyncio
import selectors
import socket
from typing import Any

import pytest

from eagleray.deploy.bench.http_load import Ask, HttpLoad


class Selector(selectors.DefaultSelector):
    """Where the event loop would sleep, its clock moves on instead."""

    now = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class Loop(asyncio.SelectorEventLoop):
    """On the clock of its selector."""

    def __init__(self, selector: Selector) -> None:
        self._clock = selector
        super().__init__(selector)

    def time(self) -> float:
        return self._clock.now

    monotonic = time  # so it stands for the module `time`, too


def test_requests_are_sent_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """To where nobody listens, so that each is over at once."""
    loop = Loop(Selector())
    monkeypatch.setattr("eagleray.deploy.bench.http_load.time", loop)
    due = [0.0, 0.25, 0.25, 7.0, 500.0]
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        load = HttpLoad(f"http://127.0.0.1:{taken.getsockname()[1]}", {}, 30.0, None)
        start = loop.time()
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            exchanges = runner.run(load.measure([Ask({}, after) for after in due]))
    assert [exchange.times.due - start for exchange in exchanges] == pytest.approx(due)
    assert [exchange.sent - start for exchange in exchanges] == pytest.approx(due)
    assert {exchange.times.error for exchange in exchanges} <= {"ConnectError", "ConnectTimeout"}
