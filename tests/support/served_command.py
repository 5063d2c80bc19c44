"""`eagleray serve` as a process with a tiny model, its processes by name, and what it leaves when it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from support.free_port import free_port
from support.processes import command_line

SERVE = [sys.executable, "-m", "eagleray", "serve"]
OPTIONS = [
    *["--tp", "2", "--threads-per-rank", "1", "--cpus-per-rank", "0.1", "--device", "cpu"],
    *["--kv-cache-bytes", "8000000", "--served-model-name", "tiny", "--drain-timeout-s", "10"],
]
FOLDER = "RAY_SERVE_HAPROXY_SERVER_STATE_BASE"
NAMES = {  # by what is in their command lines
    "rank": "ray::RankActor",
    "core": "ray::CoreActor",
    "replica": "ray::ServeReplica",
    "haproxy": "bin/haproxy",
    "controller": "ray::ServeController",
    "proxy": "ray::HAProxyManager",
    "raylet": "raylet/raylet",
    "gcs": "gcs/gcs_server",
}


class ServedCommand:
    """One that runs in a folder for temporary files of its own."""

    def __init__(self, model: Path, *words: str, environment: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}  # of our own Ray
        mine = {
            "RAY_ADDRESS": "local",
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(self.folder),
            "RAY_TMPDIR": str(self.folder),
        }
        self.port = free_port()
        self.log = self.folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*SERVE, str(model), *OPTIONS, "--port", str(self.port), *words],
                stdout=log,
                stderr=log,
                env=others | mine | (environment or {}),
                start_new_session=True,
            )
        self.seen: dict[int, psutil.Process] = {}
        self._folders: set[Path] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take away what is there still."""
        self.end(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until_it_answers(self, patience_s: float = 300.0) -> None:
        self.until(lambda: "answers at" in self.log.read_text(), patience_s)

    def until(self, what: Callable[[], bool], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not what():
            self.family()
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.1)

    def family(self) -> list[psutil.Process]:
        """All processes below the command, which are remembered."""
        try:
            found = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        for process in found:
            if process.pid not in self.seen:
                self.seen[process.pid] = process
                with suppress(psutil.Error):
                    self._folders |= {Path(process.environ()[FOLDER])} if FOLDER in process.environ() else set()
        return list(found)

    def named(self, name: str) -> list[psutil.Process]:
        return [process for process in self.family() if NAMES[name] in command_line(process)]

    def end(self, number: signal.Signals = signal.SIGTERM, patience_s: float = 120.0) -> float:
        """Tell it to end; the seconds that it took."""
        self.family()
        begin = time.monotonic()
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait(patience_s)
        return time.monotonic() - begin

    def zombies(self) -> list[str]:
        found = []
        for process in self.family():
            with suppress(psutil.NoSuchProcess):  # it has ended, and was reaped
                if process.status() == psutil.STATUS_ZOMBIE:
                    found.append(process.name())
        return found

    def own_folders(self) -> list[Path]:
        """Where HAProxy's files are, as far as there are any."""
        return [folder for folder in self._folders if folder.exists()]

    def left(self) -> list[str]:
        """Processes and files of a command that has ended."""
        alive = [f"{process.pid} {command_line(process)}" for process in self.seen.values() if process.is_running()]
        mine = [str(folder) for folder in self.own_folders()]
        sockets = [str(file) for file in self.folder.rglob("*") if file.is_socket()]
        return alive + mine + sockets


def complaints(text: str) -> list[str]:
    """Lines of a log that the command wrote itself."""
    return re.findall(r"^eagleray: (.*)$", text, re.MULTILINE)
