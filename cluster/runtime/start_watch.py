"""Collects the ranks' progress reports while an engine starts."""

import time
from collections.abc import Callable

import msgspec
import zmq

from eagleray.cluster.core.executor import LOOK_S
from eagleray.cluster.core.inbox import Inbox
from eagleray.cluster.runtime.actor_calls import ActorCalls
from eagleray.workers.protocol.channel import Hub, milliseconds
from eagleray.workers.protocol.startup import PHASES, PROCESSES, OnProgress, Progress


class StartWatch:
    """Hands `on_progress` the state of all ranks whenever it changes. They tell it at `endpoint`."""

    def __init__(self, num_ranks: int, on_progress: OnProgress, ip: str | None) -> None:
        """`ip` is the address that the ranks' nodes reach this one by; None if all ranks are here."""
        self._hub = Hub(ip)
        self.endpoint = self._hub.endpoint
        self._inbox = Inbox(self._hub, msgspec.msgpack.Decoder(Progress).decode)
        self._ranks = AllRanks(num_ranks)
        self._on_progress = on_progress

    def wait(self, call: ActorCalls, deadline: float, look: Callable[[], None]) -> None:
        """Until the one call has ended, well or not, or the time is over; closes the call.

        Meanwhile it calls `look` at least every `LOOK_S`, which may raise what ends the wait.
        """
        poller = zmq.Poller()
        poller.register(self._hub.socket, zmq.POLLIN)
        poller.register(call.fd, zmq.POLLIN)
        try:
            while call.next(0) is None and (left := deadline - time.monotonic()) > 0:
                poller.poll(milliseconds(min(left, LOOK_S)))
                self._listen()
                look()
            self._listen()
        finally:
            call.close()

    def _listen(self) -> None:
        while (news := self._inbox.receive()) is not None:
            before = self._ranks.progress()
            self._ranks.hear(*news)
            if (now := self._ranks.progress()) != before:
                self._on_progress(now)

    def close(self) -> None:
        self._hub.close()


class AllRanks:
    """The phase of the slowest rank, and how much all of them have of it."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._told: dict[bytes, dict[str, Progress]] = {}  # the last of every phase; a rank goes through all, in order

    def hear(self, rank: bytes, news: Progress) -> None:
        """Ranks are told apart by their names."""
        self._told.setdefault(rank, {})[news.phase] = news

    def progress(self) -> Progress:
        """Until every rank has been heard, their processes are on their way; sums wait for all to have counted."""
        if len(self._told) < self._num_ranks:
            return Progress(PROCESSES)
        ranks = self._told.values()
        phase = min((next(reversed(rank)) for rank in ranks), key=PHASES.index)
        counts = [rank[phase] for rank in ranks]
        if not all(count.total for count in counts):
            return Progress(phase)
        return Progress(phase, sum(count.done for count in counts), sum(count.total for count in counts))
