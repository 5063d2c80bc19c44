"""Supervises the worker process of `eagleray serve` and everything it starts.

Ray, Serve and HAProxy are processes below that one. This one imports nothing of them and waits for nothing but the
kernel, so it can end them at any moment, even in the middle of their start, and outlives whatever happens to them. It
ends within seconds, with one line and a code other than 0, if something has gone without which the server cannot go
on; it lets processes go on that somebody has stopped; it leaves no process and no file behind.
"""

import logging
import os
import selectors
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from eagleray.deploy.serve.health_probes import HealthProbe
from eagleray.deploy.serve.process_tree import (
    POLL_S,
    STOPPED,
    ZOMBIE,
    adopt_orphans,
    descendants,
    end_descendants,
    state,
)
from eagleray.deploy.serve.server_link import CommandEnd, News, ServerEnd, Watched, linked
from eagleray.workers.protocol.socket_directory import remove_left_behind

logger = logging.getLogger(__name__)

WATCH_S = 0.5  # between two looks at those without which nothing goes on
LOOK_S = 2.0  # between two looks at all processes
STOPPED_S = 4.0  # how long a process may be stopped
SETTLE_S = 0.3  # how long it may take until it shows that the server has ended, and all else because of that
KILL_S = 20.0  # how long the kernel may take to end what was killed
EXIT_CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGINT: 130}
FAILED = 1
SERVER = "the server's own process"

Work = Callable[[ServerEnd], int]
Folders = Callable[[int], Iterable[Path]]  # of the process that works


def supervised(work: Work, patience_s: tuple[float, float], folders: Folders) -> int:
    """Run the work until it ends, or a signal tells it to; the exit code comes once nothing is left.

    `patience_s` says how long it may take to end once told to: before it serves, and after. `folders` tells which
    are to be gone then.
    """
    adopt_orphans()
    with _heard_signals() as (signals, wake):
        server, link = _forked(work, patience_s[0])
        watch = _Watch(server, link, patience_s, folders, wake)
        try:
            return watch.until_the_end(signals)
        finally:
            watch.leave_nothing()


class _Watch:
    def __init__(
        self, server: int, link: CommandEnd, patience_s: tuple[float, float], folders: Folders, wake: int
    ) -> None:
        self._server = server
        self._link = link
        self._patience_s = patience_s
        self._folders = folders
        self._wake = wake
        self._serving = False
        self._told: int | None = None  # the code to end with, once a signal has told to end
        self._deadline = float("inf")
        self._code: int | None = None  # once all is to end now
        self._selector = selectors.DefaultSelector()
        self._probes: list[HealthProbe] = []
        self._watched = [Watched(SERVER, server)]
        self._stopped: dict[int, float] = {}  # processes, and since when
        self._next_look = time.monotonic()

    def until_the_end(self, signals: int) -> int:
        """The exit code."""
        self._selector.register(signals, selectors.EVENT_READ, self._hear_signals)
        self._selector.register(self._link.news, selectors.EVENT_READ, self._hear_news)
        while self._code is None:
            self._wait()
        return self._code

    def _wait(self) -> None:
        for key, _ in self._selector.select(min(WATCH_S, max(0.0, self._deadline - time.monotonic()))):
            key.data(key.fd)
        now = time.monotonic()
        missed = next((each for each in self._watched if state(each.pid) in (None, ZOMBIE)), None)
        if self._code is not None:
            return
        if missed is not None:
            self._miss(missed, SETTLE_S)
        elif now >= self._deadline:
            logger.warning("the server did not end in time, and is killed")
            self._code = FAILED
        elif now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look(now)

    def _hear_signals(self, fd: int) -> None:
        for number in os.read(fd, 64):
            if number == 0:
                continue  # a probe's
            code = EXIT_CODES[signal.Signals(number)]
            if self._told is not None:
                self._code = EXIT_CODES[signal.SIGINT]
                return
            patience_s = self._patience_s[self._serving]
            self._told, self._deadline = code, time.monotonic() + patience_s
            if not self._serving:
                logger.info("ended before the model was ready")
            if patience_s == 0:
                self._code = code
                return
            self._link.end()

    def _hear_news(self, fd: int) -> None:
        try:
            for news in self._link.hear():
                self._take(news)
        except EOFError:  # the server ends, and what it has started with it
            self._selector.unregister(fd)
            self._miss(self._watched[0], KILL_S)

    def _take(self, news: News) -> None:
        self._serving = self._serving or news.serving
        for watched in news.watched:
            self._watched.append(watched)
            if watched.health is not None:
                self._probes.append(HealthProbe(watched, self._hear_silence))

    def _hear_silence(self, watched: Watched) -> None:
        """Called in a probe's thread."""
        if self._told is None and self._code is None:
            logger.error("%s (process %d) no longer responds; the server ends", watched.name, watched.pid)
        self._code = FAILED
        os.write(self._wake, b"\0")

    def _miss(self, watched: Watched, patience_s: float) -> None:
        """Something has ended. The server may, if it says why or was told to; what it has started ends with it."""
        code = self._server_code(patience_s)
        if code is not None and (code > 0 or self._told is not None):
            self._code = code or self._told
            return
        if code is not None:
            watched = Watched(SERVER, self._server)
        how = f", killed by {signal.Signals(-code).name}" if code else ""
        logger.error("%s (process %d) is gone%s; the server ends", watched.name, watched.pid, how)
        self._code = FAILED

    def _server_code(self, patience_s: float) -> int | None:
        """The exit code of the server's process, or None if it still runs; a signal that ended it is negative."""
        deadline = time.monotonic() + patience_s
        while not os.waitid(os.P_PID, self._server, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)
        return os.waitstatus_to_exitcode(os.waitpid(self._server, 0)[1])

    def _look(self, now: float) -> None:
        """Resume processes that were stopped, and reap those that nobody waits for."""
        processes = descendants(os.getpid())
        self._stopped = {
            process.pid: self._stopped.get(process.pid, now) for process in processes if process.state == STOPPED
        }
        for process in processes:
            if now - self._stopped.get(process.pid, now) >= STOPPED_S:
                logger.warning("%s (process %d) was stopped; resumed", process.name(), process.pid)
                os.kill(process.pid, signal.SIGCONT)
                del self._stopped[process.pid]
            elif process.state == ZOMBIE and process.parent == os.getpid() and process.pid != self._server:
                os.waitpid(process.pid, os.WNOHANG)

    def leave_nothing(self) -> None:
        for probe in self._probes:
            probe.close()
        for process in end_descendants(KILL_S):
            logger.error("%s (process %d) cannot be killed", process.name(), process.pid)
        remove_left_behind(min_age_s=0)  # sockets of ranks and cores
        for folder in self._folders(self._server):
            shutil.rmtree(folder, ignore_errors=True)


def _forked(work: Work, alone_s: float) -> tuple[int, CommandEnd]:
    """The server's process, and the link to it."""
    command, server = linked()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_server(work, alone_s, command, server)
    for fd in server:
        os.close(fd)
    return pid, CommandEnd(*command)


def _be_server(work: Work, alone_s: float, command: tuple[int, int], server: tuple[int, int]) -> None:
    """Never returns. Signals of the terminal go to the command, which passes on what they mean."""
    code = FAILED
    try:
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for number in EXIT_CODES:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for fd in command:
            os.close(fd)
        link = ServerEnd(*server, on_orphaned=lambda: _end_alone(alone_s))
        code = work(link)
        if link.orphaned:
            end_descendants(KILL_S)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _end_alone(patience_s: float) -> None:
    """The command was killed: kill everything below if the work does not end within this time."""
    time.sleep(patience_s)
    end_descendants(KILL_S)
    os._exit(FAILED)


@contextmanager
def _heard_signals() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe from which signals can be read as bytes, whatever Python is doing."""
    out, into = os.pipe()
    os.set_blocking(into, False)
    heard = [number for number in EXIT_CODES if signal.getsignal(number) != signal.SIG_IGN]  # as nohup has it
    before = {number: signal.signal(number, _nothing) for number in heard}
    wakeup = signal.set_wakeup_fd(into)
    try:
        yield out, into
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    """Its byte is in the pipe."""
