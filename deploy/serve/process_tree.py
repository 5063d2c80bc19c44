"""The processes below one, read from /proc, and ending them."""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
POLL_S = 0.02
STOPPED, ZOMBIE = "T", "Z"


@dataclass(frozen=True)
class Process:
    """One that there was a moment ago."""

    pid: int
    parent: int
    state: str  # a letter; see proc(5)

    def name(self) -> str:
        """What it calls itself."""
        with suppress(OSError):
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
            return os.path.basename(words[0].decode(errors="replace"))
        return "?"


def adopt_orphans() -> None:
    """From now on, a descendant whose parent ends becomes a child of this process, and not of another."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def descendants(pid: int) -> list[Process]:
    """All below a process, those that wait to be reaped included."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found, todo = [], [pid]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += [process.pid for process in below]
    return found


def end_descendants(patience_s: float) -> list[Process]:
    """Kill all that is below this process, and whatever they start meanwhile. Returns what is left, which is nothing
    unless the kernel holds one.
    """
    deadline = time.monotonic() + patience_s
    while (left := descendants(os.getpid())) and time.monotonic() < deadline:
        for process in left:
            if process.state != ZOMBIE:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(POLL_S)
    return left


def state(pid: int) -> str | None:
    """Its letter, or None if there is no such process."""
    about = _about(pid)
    return None if about is None else about.state


def _all() -> Iterator[Process]:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (about := _about(int(entry))) is not None:
            yield about


def _about(pid: int) -> Process | None:
    try:
        words = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()  # behind the name
    except OSError:
        return None  # it has ended
    return Process(pid, int(words[1]), words[0].decode())
