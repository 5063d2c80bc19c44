"""The progress of a server's start, reported by its replicas through Ray and shown by `eagleray serve`."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
from rich.console import Console

from eagleray.cluster.runtime.start_display import shown_start, size_of
from eagleray.deploy.serve.config import ServeArgs
from eagleray.workers.protocol.startup import READY, OnProgress, Progress

logger = logging.getLogger(__name__)

LINE_S = 10.0  # between lines of a log
MIN_S = 0.2  # between words of a replica about the same phase
KEY = "eagleray start of "


class ProgressReporter:
    """An `OnProgress` in a replica, which anyone who knows the application's name can read."""

    def __init__(self, application: str) -> None:
        self._key = f"{KEY}{application}".encode()
        self._last = Progress("")
        self._time = 0.0

    def __call__(self, progress: Progress) -> None:
        from ray.experimental.internal_kv import _internal_kv_put

        now = time.monotonic()
        if progress.phase != self._last.phase or progress.done == progress.total or now - self._time >= MIN_S:
            _internal_kv_put(self._key, msgspec.json.encode(progress), overwrite=True)
            self._last, self._time = progress, now


def forget(application: str) -> None:
    """What replicas have said of earlier starts."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(f"{KEY}{application}".encode())


def latest(application: str) -> Progress | None:
    """What its replica has said last; None before the first word."""
    from ray.experimental.internal_kv import _internal_kv_get

    said = _internal_kv_get(f"{KEY}{application}".encode())
    return None if said is None else msgspec.json.decode(said, type=Progress)


@contextmanager
def shown_serve(args: ServeArgs) -> Iterator[OnProgress]:
    """Show progress: on a terminal in the line that other commands have, in a log by a line now and then."""
    if sys.stderr.isatty():
        with shown_start(args.engine, Console(stderr=True)) as show:
            yield show
        return
    lines = Lines(args.model_name)
    try:
        yield lines.hear
    finally:
        lines.close()


class Lines:
    """Writes what it has heard last, as long as it has not heard that all is ready."""

    def __init__(self, name: str, period_s: float = LINE_S) -> None:
        self._name = name
        self._period_s = period_s
        self._progress = Progress("")
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._write, name="start", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the last line."""
        self._ready.set()
        self._thread.join()

    def hear(self, progress: Progress) -> None:
        self._progress = progress
        if progress.phase == READY:
            self._ready.set()

    def _write(self) -> None:
        begin = time.monotonic()
        while not self._ready.wait(self._period_s):
            now = self._progress
            size = f" {size_of(now.done, now.total)}" if now.total else ""
            logger.info("starting %s: %s%s, %.0f s", self._name, now.phase, size, time.monotonic() - begin)
