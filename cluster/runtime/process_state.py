"""The kernel's view of a process on this machine."""

import os
import signal
from contextlib import suppress
from pathlib import Path

DEAD = "ZX"
STOPPED = "Tt"
_WORDS = {
    "T": "is stopped",
    "t": "is held by a debugger",
    "Z": "is dead",
    "X": "is dead",
    "D": "waits for a device or a disk",
}


def state_of(pid: int) -> str:
    """One letter, as in proc(5): R, S, D, T, t, Z or X, which is also that of a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return "X"


def has_ended(pid: int) -> bool:
    """Whether nothing of the process runs any more. Its first thread may be dead while others still hold its files."""
    try:
        return state_of(pid) in DEAD and len(os.listdir(f"/proc/{pid}/task")) <= 1
    except FileNotFoundError:
        return True


def in_words(pid: int) -> str:
    """`process 1234 is stopped`."""
    return f"process {pid} {_WORDS.get(state_of(pid), 'runs, but does not get to say so')}"


def kill_if_stopped(pid: int) -> None:
    """End a process that could not end by itself, however it is asked."""
    if state_of(pid) in STOPPED:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> set[int]:
    """The processes that this one has started, and those have started, as far as they are there."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found: set[int] = set()
    new = [pid]
    while new:
        new = [child for each in new for child in children.get(each, [])]
        found.update(new)
    return found
