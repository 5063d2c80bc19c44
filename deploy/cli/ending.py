"""Ends a command soon after SIGTERM, even if its main thread cannot be interrupted.

A handler of Python's runs between two of its instructions, so not while Ray's own code waits for a cluster that says
nothing. What the system hands over when a signal comes is a byte in a pipe, and a thread waits for that.
"""

import asyncio
import inspect
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

from eagleray.cluster.runtime.process_state import descendants
from eagleray.cluster.runtime.signals import kill

T = TypeVar("T")
TERMINATED = 128 + signal.SIGTERM  # as shells have it
GRACE_S = 5.0  # to close engines and let go of files


class Terminated(SystemExit):
    """SIGTERM came. asyncio hands on a `SystemExit` from wherever it is raised, and of other kinds only `Ctrl-C`'s."""


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Raise `Terminated` here when SIGTERM comes; at most `GRACE_S` later, everything ends that this process started.

    For the main thread; what was set before is set again afterwards.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.signal(signal.SIGTERM, _Once())
    pipe_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=_end_late, args=[reader], name="sigterm", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(pipe_before)
        signal.signal(signal.SIGTERM, before)
        writer.close()


def run_async(function: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """As `asyncio.run(function())`, but a signal leaves no loop half made and no coroutine forgotten.

    One that comes while the loop is made is handled once it is there.
    """
    runner = asyncio.Runner()
    try:
        with _held(signal.SIGINT, signal.SIGTERM):
            runner.get_loop()
        coroutine = function()
        try:
            return runner.run(coroutine)
        finally:
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
    finally:
        runner.close()


@contextmanager
def _held(*numbers: int) -> Iterator[None]:
    """What handlers of these signals do, they do afterwards. Other threads than the main one have no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append((number, frame))

    handlers = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handler = handlers[number]
            if callable(handler):
                handler(number, frame)


class _Once:
    """Raises only once, so that closing an engine is not interrupted."""

    def __init__(self) -> None:
        self._told = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self._told:
            self._told = True
            raise Terminated(TERMINATED)


def _end_late(reader: socket.socket) -> None:
    while numbers := reader.recv(64):
        if signal.SIGTERM in numbers:
            time.sleep(GRACE_S)
            kill(descendants(os.getpid()))
            os._exit(TERMINATED)
    reader.close()
