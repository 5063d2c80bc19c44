"""A rank's heartbeat: sent by a thread of its own, also during long steps."""

import os
from threading import Event, Thread

import msgspec

from eagleray.workers.protocol.channel import Endpoint, Peer
from eagleray.workers.protocol.messages import Beat

BEAT_S = 0.5


class Heartbeat:
    """Beats at the hub from its construction on."""

    def __init__(self, rank: int, endpoint: Endpoint) -> None:
        self._over = Event()
        self._thread = Thread(target=self._run, args=(rank, endpoint), name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self, rank: int, endpoint: Endpoint) -> None:
        hub = Peer(endpoint, b"heartbeat %d" % rank)
        beat = msgspec.msgpack.encode(Beat(rank, os.getpid()))
        hub.send(beat)
        while not self._over.wait(BEAT_S):
            hub.send(beat)
        hub.close()

    def close(self) -> None:
        """No more beats."""
        self._over.set()
        self._thread.join(2 * BEAT_S)
