"""Signals to processes of something that runs, and what was left of it afterwards."""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

GONE_S = 20.0


@dataclass(kw_only=True)
class Struck:
    """One line of a kill table. Times are seconds since the signal."""

    victim: str
    signal: str
    seen: dict[str, int] = field(default_factory=dict)  # what clients were told, and how many of them
    first_s: float | None = None  # until the first of them was told
    last_s: float | None = None  # and the last
    again_s: float | None = None  # until an answer came again
    gone_s: float | None = None  # from the end on, until no process was left; None if some were
    left: list[str] = field(default_factory=list)  # processes and files

    def see(self, what: str, seconds: float) -> None:
        """A client was told this."""
        self.seen[what] = self.seen.get(what, 0) + 1
        self.first_s = round(seconds, 2) if self.first_s is None else self.first_s
        self.last_s = round(seconds, 2)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def own_places() -> Iterator[tuple[dict[str, str], Path]]:
    """An environment whose temporary files and Ray are nobody else's, and where they lie."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="k") as folder:  # short, since sockets lie there
        places = {"TMPDIR": f"{folder}/t", "RAY_TMPDIR": f"{folder}/r"}
        for place in places.values():
            os.mkdir(place)
        clean = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        yield clean | places | {"OMP_NUM_THREADS": "1"}, Path(folder)


def family(pid: int) -> list[psutil.Process]:
    """A process and all below it, as far as they are there."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def processes_in(folder: Path) -> list[psutil.Process]:
    """Those whose environment names this folder, whoever has started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in process.environ().get("TMPDIR", "") and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())[:120] or process.name()
    except psutil.Error:
        return "gone"


def wait_until_gone(processes: list[psutil.Process], struck: Struck) -> None:
    """Note how long they take to end; those that do not are named and killed."""
    begin = time.monotonic()
    _, alive = psutil.wait_procs(processes, timeout=GONE_S)
    if not alive:
        struck.gone_s = round(time.monotonic() - begin, 2)
    for process in alive:
        struck.left.append(f"{process.pid} {process.status()} {title(process)}")
        process.kill()
    psutil.wait_procs(alive, timeout=GONE_S)


def send(pid: int, name: str) -> None:
    os.kill(pid, signal.Signals[name])
