"""Renders chat templates in a process of its own: bounded in time and memory, off the caller's event loop."""

import asyncio
import marshal
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from eagleray.cluster.frontend import template_process
from eagleray.cluster.frontend.template_process import MEMORY_BYTES, Answer, receive, send

QUICK_S, SLOW_S = 0.02, 0.5  # of processor time: most need far less than the first, none may take more than the second
PATIENCE_S = 60.0  # until the process counts as stuck: it has limits of its own, but may be stopped


class LaneLostError(Exception):
    """The process is gone."""


class ChatRenderer:
    """Two lanes, so that quick conversations do not wait for slow ones: what is slow in the first moves to the second.

    Threads may share it. The process starts with `start` or the first request, and ends with this one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []

    def start(self) -> "list[Lane]":
        """Start the process, if it does not run."""
        with self._lock:
            self._start()
            return self._lanes

    def warm_up(self) -> bool:
        """As `start`; whether it did not run."""
        with self._lock:
            return self._start()

    def end_unused(self) -> None:
        """End the process if it was asked for nothing yet; a request starts another."""
        with self._lock:
            if self._works() and not any(lane.asked for lane in self._lanes):
                for lane in self._lanes:
                    lane.end()
                self._lanes = []

    def _start(self) -> bool:
        if self._works():
            return False
        self._lanes = _lanes()
        return True

    def _works(self) -> bool:
        return bool(self._lanes) and all(lane.works for lane in self._lanes)

    def render(self, template: str, messages: Any, options: dict[str, Any]) -> str:
        """The text. Raises `ValueError` for what the template refuses, or cannot do within its bounds."""
        request = (template, messages, options)
        for _ in range(2):
            quick, slow = self.start()
            with suppress(LaneLostError):
                answer, text = quick.ask(QUICK_S, *request)
                if answer is Answer.SLOW:
                    answer, text = slow.ask(SLOW_S, *request)
                return _checked(answer, text)
        raise RuntimeError("the process for chat templates ended twice; standard error has why")

    async def arender(self, template: str, messages: Any, options: dict[str, Any]) -> str:
        """As `render`, while others go on."""
        run = asyncio.get_running_loop().run_in_executor
        request = (template, messages, options)
        for _ in range(2):
            lanes = self._lanes
            if not lanes or not all(lane.works for lane in lanes):
                lanes = await asyncio.to_thread(self.start)
            quick, slow = lanes
            with suppress(LaneLostError):
                answer, text = await run(quick.thread, quick.ask, QUICK_S, *request)
                if answer is Answer.SLOW:
                    answer, text = await run(slow.thread, slow.ask, SLOW_S, *request)
                return _checked(answer, text)
        raise RuntimeError("the process for chat templates ended twice; standard error has why")


@cache
def chat_renderer() -> ChatRenderer:
    """This process's renderer, shared by all tokenizers, since it takes a second or two to start."""
    return ChatRenderer()


class Lane:
    """One request at a time, in the order in which they come."""

    def __init__(self, connection: socket.socket, process: "subprocess.Popen[bytes]") -> None:
        connection.settimeout(PATIENCE_S)
        self.asked = False  # for anything yet
        self.thread = ThreadPoolExecutor(1, "chat template")
        self._connection = connection
        self._process = process
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._lost = False

    @property
    def works(self) -> bool:
        """Whether the process is there and belongs to this one, not to a process that this one was forked from."""
        return not self._lost and self._owner == os.getpid()

    def ask(self, seconds: float, template: str, messages: Any, options: dict[str, Any]) -> tuple[Answer, str]:
        """Raises `LaneLostError` if the process has ended, or was stuck and is killed."""
        request = marshal.dumps((seconds, template, plain(messages), plain(options)))
        self.asked = True
        with self._lock:
            try:
                send(self._connection, request)
                answer = receive(self._connection)
            except OSError as error:
                self._end()
                raise LaneLostError from error
            if answer is None:
                self._end()
                raise LaneLostError
        return Answer(answer[0]), answer[1:].decode("utf-8", "surrogatepass")

    def end(self) -> None:
        """End the process, once it has answered what it was asked."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._lost = True
        self._connection.close()
        if self._process.returncode is None:  # or else its number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _lanes() -> list[Lane]:
    pairs = [socket.socketpair() for _ in range(2)]
    files = [theirs.fileno() for _, theirs in pairs]
    program = f"import sys; sys.path[:] = {sys.path!r}; from {template_process.__name__} import main; main({files})"
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=files,
        start_new_session=True,  # so that it can be ended with its children
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # threads do not survive a fork
    )
    for _, theirs in pairs:
        theirs.close()
    return [Lane(ours, process) for ours, _ in pairs]


def plain(value: Any) -> Any:
    """As templates may see it: what is not a plain value is only said to be there, as in transformers."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # an enumeration's, say
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return plain(dump())
    return f"<{type(value).__name__}>"


def _checked(answer: Answer, text: str) -> str:
    match answer:
        case Answer.TEXT:
            return text
        case Answer.REFUSED:
            raise ValueError(f"the chat template refuses the messages: {text}")
        case Answer.SLOW:
            why = f"takes more than {SLOW_S:g} s of processor time"
        case Answer.TOO_MUCH:
            why = f"needs more than {MEMORY_BYTES // 2**20} MiB of memory, or makes too long a text"
        case Answer.DIED:
            why = "ended the process that it ran in: it takes too much time or memory"
    raise ValueError(f"the chat template {why} for these messages; send fewer or shorter ones, and other variables")
