"""Reports the progress of this rank's start while it runs."""

import time

import msgspec

from eagleray.workers.protocol.channel import Endpoint, Peer
from eagleray.workers.protocol.startup import Progress

PAUSE_S = 0.1  # between counts of one phase


class StartupReporter:
    """Every phase at once, counts only now and then. Nothing here waits for the listener at `endpoint`."""

    def __init__(self, rank: int, endpoint: Endpoint) -> None:
        self._hub = Peer(endpoint, b"rank %d" % rank)
        self._phase = ""
        self._quiet_until = 0.0

    def begin(self, phase: str) -> None:
        """The next phase, one of `PHASES`."""
        self._phase = phase
        self._tell(Progress(phase))

    def count(self, done: int, total: int) -> None:
        """How much of this phase is done; the whole of it is always told."""
        now = time.monotonic()
        if done == total or now >= self._quiet_until:
            self._quiet_until = now + PAUSE_S
            self._tell(Progress(self._phase, done, total))

    def _tell(self, progress: Progress) -> None:
        self._hub.send(msgspec.msgpack.encode(progress))

    def close(self) -> None:
        """The start is over."""
        self._hub.close()
