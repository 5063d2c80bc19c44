"""Sends outputs from a thread of its own, so that the next step is launched while the last one's tokens travel."""

import time
from queue import SimpleQueue
from threading import Thread
from typing import Protocol

import msgspec

from eagleray.workers.protocol.channel import Endpoint, Peer
from eagleray.workers.protocol.messages import StepOutput


class Pending(Protocol):
    """An output that can be waited for."""

    def wait(self) -> StepOutput: ...


class OutputSender:
    """Waits for each output in turn and sends it to the hub."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._pending: SimpleQueue[tuple[Pending, float]] = SimpleQueue()
        self._failure: BaseException | None = None
        Thread(target=self._run, args=(endpoint,), name="output sender", daemon=True).start()

    def report(self, pending: Pending, launched: float) -> None:
        """Send an output once it is there, after those before it. `launched` is `time.monotonic()` of its launch."""
        self._pending.put((pending, launched))

    def check(self) -> None:
        """Raise what ended the thread, if something did."""
        if self._failure is not None:
            raise self._failure

    def _run(self, endpoint: Endpoint) -> None:
        hub = Peer(endpoint, b"outputs")
        encode = msgspec.msgpack.Encoder().encode
        last = 0.0  # when the output before was there
        try:
            while True:
                pending, launched = self._pending.get()
                output = pending.wait()
                now = time.monotonic()
                output.gpu_seconds = now - max(launched, last)
                last = now
                hub.send(encode(output))
        except BaseException as error:  # it belongs to the thread that serves
            self._failure = error
