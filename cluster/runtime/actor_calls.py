"""Watches long calls on several Ray actors: which have ended, and which failure caused the others."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

import ray

from eagleray.cluster.errors import EngineDeadError, EngineStartError

OWN_WORDS = (
    ValueError,
    MemoryError,
    EngineStartError,
    EngineDeadError,
)  # written for a person; other errors need their type's name
DEATH_NOTICE_S = 1.0  # how long Ray may take to report a dead process after its peers have noticed


class ActorCalls:
    """Calls on actors, one on each. `fd` is readable while `next` has an end to tell, so polls on sockets see it."""

    def __init__(self, refs: "Sequence[ray.ObjectRef[Any]]") -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK | os.EFD_SEMAPHORE)
        self._lock = Lock()
        self._ended: SimpleQueue[tuple[int, BaseException | None]] = SimpleQueue()
        for index, ref in enumerate(refs):
            ref.future().add_done_callback(partial(self._note, index))

    def _note(self, index: int, future: "Future[Any]") -> None:
        with self._lock:
            self._ended.put((index, future.exception()))
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def next(self, timeout_s: float) -> tuple[int, BaseException | None] | None:
        """The actor whose call ended next and the error it ended with; None if none did within `timeout_s`."""
        try:
            ended = self._ended.get(timeout=max(0.0, timeout_s))
        except Empty:
            return None
        with self._lock:  # in which the end was put and the descriptor written
            if self.fd >= 0:
                os.eventfd_read(self.fd)
        return ended

    def close(self) -> None:
        """Stop watching. ActorCalls that end later are not noted."""
        with self._lock:
            if self.fd >= 0:
                os.close(self.fd)
            self.fd = -1

    def blame(self, index: int, error: BaseException | None) -> str:
        """Name the failed rank and the cause, given the first call that ended.

        When a process dies, its peers' collectives may fail before Ray reports the death; the death is the cause then.
        """
        deadline = time.monotonic() + DEATH_NOTICE_S
        ended: tuple[int, BaseException | None] | None = (index, error)
        while ended is not None:
            if _is_cause(ended[1]):
                index, error = ended
                break
            ended = self.next(deadline - time.monotonic())
        return f"rank {index}: {describe(error)}"


def _is_cause(error: BaseException | None) -> bool:
    """Collectives fail with `RuntimeError`; anything else is a rank's own fault."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return not isinstance(error.cause, RuntimeError)
    return True


def is_death(error: BaseException | None) -> bool:
    """Whether the process is gone, so that it had no words of its own."""
    return error is None or isinstance(error, ray.exceptions.RayActorError)


def describe(error: BaseException | None) -> str:
    if error is None:
        return "it stopped serving"
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        return str(cause) if isinstance(cause, OWN_WORDS) else f"{type(cause).__name__}: {cause}"
    if isinstance(error, ray.exceptions.RayActorError):
        return f"its process is gone ({_exit_detail(str(error))})"
    return f"{type(error).__name__}: {error}"


def _exit_detail(text: str) -> str:
    """The one telling line of Ray's report."""
    for line in text.splitlines():
        _, found, detail = line.partition("Worker exit detail: ")
        if found:
            return detail.split(". ")[0].rstrip(".")
    return text.strip().splitlines()[-1].strip()
