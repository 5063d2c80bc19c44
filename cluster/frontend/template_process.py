"""The process that renders chat templates, and limits the time and memory of each.

Templates come with checkpoints and their contents from clients, and nothing in Python bounds the cost of a long loop,
of `'a' * 10**9` or of a regular expression. So one process imports transformers' renderer, which takes a second or two,
and forks a child for each socket that it is given. One that the kernel ends is replaced within milliseconds.

Frames are a length and that many bytes: a request is `marshal`'s, an answer an `Answer` and a text.
"""

import marshal
import mmap
import os
import resource
import signal
import socket
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any

LENGTH = struct.Struct("<I")
MEMORY_BYTES = 512 * 2**20  # beyond what the process has at its start
MAX_TEXT_BYTES = 64 * 2**20
MAX_ERROR = 2000  # characters
GRACE_S = 0.1  # what Python does at one go may take so much longer, then the kernel ends the process
PRIME_S = 1.0  # for a template that was not seen before
ENDS, ENDS_FOR_ANOTHER = 0, 3  # exit codes


class Answer(IntEnum):
    """What became of a request."""

    TEXT = 0
    REFUSED = 1  # why, in the template's words
    SLOW = 2
    TOO_MUCH = 3  # memory, or text
    DIED = 4


class Doing(IntEnum):
    NOTHING = 0
    READ_OR_WRITE = 1
    RENDER = 2


class TooSlowError(BaseException):
    """Nothing in a template catches it."""


class Clock:
    """Processor time that one piece of work may take."""

    def __init__(self) -> None:
        self._runs = False
        signal.signal(signal.SIGPROF, self._ring)

    def run_within(self, seconds: float, work: Callable[[], Any]) -> Any:
        """Raises `TooSlowError`; ends the process where Python does not come to that."""
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds + GRACE_S)
        signal.setitimer(signal.ITIMER_PROF, seconds, GRACE_S / 4)
        self._runs = True
        try:
            return work()
        finally:
            self._runs = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _ring(self, *_: object) -> None:
        if self._runs:
            raise TooSlowError


def main(files: list[int]) -> None:
    """Serve each socket by a child until its other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    from transformers.utils.chat_template_utils import render_jinja_template

    lanes = [Lane(socket.socket(fileno=file), 10 * number) for number, file in enumerate(files)]
    children = {lane.fork(render_jinja_template): lane for lane in lanes}
    while children:
        pid, status = os.wait()
        lane = children.pop(pid)
        if lane.can_go_on(os.waitstatus_to_exitcode(status)):
            children[lane.fork(render_jinja_template)] = lane


class Lane:
    """A socket, and the child that serves it, one request at a time."""

    def __init__(self, connection: socket.socket, nice: int) -> None:
        self._connection = connection
        self._nice = nice  # lanes for what is slow give way
        self._doing = mmap.mmap(-1, 1)  # what the child is doing, for its parent to see if it dies

    def fork(self, render: Any) -> int:
        """Start a child."""
        self._doing[0] = Doing.NOTHING
        if pid := os.fork():
            return pid
        code = 1
        try:
            os.nice(self._nice)
            _limit_memory()
            code = self._serve(render)
        finally:
            os._exit(code)

    def can_go_on(self, code: int) -> bool:
        """Whether to start another child after one that ended with this code; a caller that waits for its answer is
        told.
        """
        match Doing(self._doing[0]):
            case _ if code == ENDS:
                return False
            case Doing.NOTHING:
                return True
            case Doing.RENDER:
                try:
                    send(self._connection, bytes([Answer.DIED]))
                except OSError:  # nobody listens
                    return False
                return True
            case Doing.READ_OR_WRITE:
                self._connection.shutdown(socket.SHUT_RDWR)  # nobody knows how far it got
                return False

    def _serve(self, render: Any) -> int:
        clock, seen = Clock(), set[str]()
        while (head := exactly(self._connection, LENGTH.size)) is not None:
            self._doing[0] = Doing.READ_OR_WRITE
            if (request := exactly(self._connection, *LENGTH.unpack(head))) is None:
                break
            self._doing[0] = Doing.RENDER
            answer, text = _answer(clock, render, seen, *marshal.loads(request))
            data = text.encode("utf-8", "surrogatepass")
            if len(data) > MAX_TEXT_BYTES:
                answer, data = Answer.TOO_MUCH, b""
            self._doing[0] = Doing.READ_OR_WRITE
            send(self._connection, bytes([answer]) + data)
            self._doing[0] = Doing.NOTHING
            if answer is Answer.TOO_MUCH:
                return ENDS_FOR_ANOTHER  # Python keeps memory that it once had
        return ENDS


def _answer(
    clock: Clock, render: Any, seen: set[str], seconds: float, template: str, messages: Any, options: Any
) -> tuple[Answer, str]:
    """`render` keeps templates that it has compiled, which for a new one takes longer than most messages do."""
    if template not in seen:
        seen.add(template)
        seconds = max(seconds, PRIME_S)
    try:
        rendered = clock.run_within(seconds, lambda: render([messages], chat_template=template, **options))
        return Answer.TEXT, str(rendered[0][0])
    except TooSlowError:
        return Answer.SLOW, ""
    except MemoryError:
        return Answer.TOO_MUCH, ""
    except Exception as error:  # whatever a template's code may raise
        return Answer.REFUSED, (str(error) or type(error).__name__)[:MAX_ERROR]


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.is_file():  # Linux
        size = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES, size + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def send(connection: socket.socket, data: bytes) -> None:
    """Write a frame."""
    connection.sendall(LENGTH.pack(len(data)))
    connection.sendall(data)


def receive(connection: socket.socket) -> bytes | None:
    """Read a frame; None once the other end is closed."""
    head = exactly(connection, LENGTH.size)
    return None if head is None else exactly(connection, *LENGTH.unpack(head))


def exactly(connection: socket.socket, size: int) -> bytes | None:
    """Read so many bytes; None if the other end is closed before."""
    found = bytearray()
    while len(found) < size:
        if not (part := connection.recv(min(size - len(found), 2**20))):
            return None
        found += part
    return bytes(found)
