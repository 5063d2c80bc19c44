"""What the kernel says of a process on this machine."""

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


def in_words(pid: int) -> str:
    """`process 1234 is stopped`."""
    return f"process {pid} {_WORDS.get(state_of(pid), 'runs, but does not get to say so')}"
