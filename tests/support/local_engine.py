"""An engine in this process, for front ends: a real scheduler over a rank whose tokens can be foretold."""

import asyncio
import threading
import time
from collections import deque

from eagleray.cluster.core.messages import Abort, EngineOutputs, RequestMessage, Submit, Tokens
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.errors import EngineDeadError
from eagleray.workers.protocol.messages import StepOutput
from support.toy_rank import ToyRank

ME = b"front end"


class LocalEngine:
    """An engine link without processes: one step a call, one step ahead, and failures on demand."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(num_blocks=400, block_size=4, max_num_seqs=64, max_num_batched_tokens=256)
        self.rank = ToyRank(400, 4)
        self.failures: dict[int, BaseException] = {}  # number of a call -> what it raises
        self.fails_at: int | None = None  # number of the call in which every running request fails
        self.num_calls = 0
        self.closed = False
        self.pauses = True
        self.waits_for = 0  # requests; before they are there no step runs
        self.waited = threading.Event()  # set by a call that found too few
        self._dead: str | None = None
        self._in_flight: deque[StepOutput] = deque()
        self._news: list[Tokens] = []

    def send(self, message: RequestMessage) -> None:
        if self._dead:
            raise EngineDeadError(self._dead)
        if isinstance(message, Submit):
            for request in message.requests:
                self.scheduler.add(ME, request)
        else:
            assert isinstance(message, Abort), "profiles are tested with ranks that have a profiler"
            self._news += filter(None, (self.scheduler.abort(ME, id) for id in message.ids))

    def wake(self) -> None:
        """Nobody ever waits here."""

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        if self.scheduler.num_unfinished < self.waits_for:
            self.waited.set()
            time.sleep(0.001)
            return None
        self.waits_for = 0
        self.num_calls += 1
        failure = self.failures.get(self.num_calls)
        if isinstance(failure, EngineDeadError):
            self._dead = str(failure)
        if self._dead:
            raise EngineDeadError(self._dead)
        if failure:
            raise failure
        while len(self._in_flight) < 2 and (step := self.scheduler.schedule()):
            self._in_flight.append(self.rank.run(step))
        news, self._news = self._news, []
        if self.num_calls == self.fails_at:
            self._in_flight.clear()
            return EngineOutputs(
                [tokens for _, tokens in self.scheduler.fail("rank 1 says no")], self.scheduler.stats()
            )
        if self._in_flight:
            news += [tokens for _, tokens in self.scheduler.update(self._in_flight.popleft())]
        return EngineOutputs(news, self.scheduler.stats()) if news else None

    async def areceive(self) -> list[EngineOutputs]:
        """After a millisecond a step; without `pauses` at once, as from a socket that never runs dry."""
        while True:
            if self.pauses:
                await asyncio.sleep(0.001)
            if news := self.receive(0):
                return [news]
            await asyncio.sleep(0.001)

    def close(self) -> None:
        self.closed = True
