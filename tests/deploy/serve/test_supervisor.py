"""A command that answers for all its processes; these do nothing, so that no Ray is needed."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import psutil
import pytest

from eagleray.deploy.serve.health_probes import HealthProbe
from eagleray.deploy.serve.server_link import Watched

pytestmark = pytest.mark.engine

PATIENCE_S = 20.0
SCRIPT = """
import logging, os, signal, subprocess, sys, time
from pathlib import Path
from eagleray.deploy.serve.server_link import News, Watched
from eagleray.deploy.serve.supervisor import supervised

logging.basicConfig(format="%(message)s", level=logging.INFO)
folder, ending, before = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def work(link):
    below = "trap '' TERM INT HUP; setsid sleep 1000 & exec sleep 1000"  # one of its own session, which is orphaned
    helper = subprocess.Popen(["bash", "-c", below])
    (folder / "socket").touch()
    link.tell(News(watched=(Watched("the helper", helper.pid),), serving=ending == "serves"))
    print(helper.pid, os.getpid(), flush=True)
    if ending == "fails":
        return 7
    link.told_to_end.wait()
    if ending == "hangs":
        time.sleep(1000)
    print("drained", flush=True)
    return 0

sys.exit(supervised(work, (before, 1000.0), lambda _: [folder]))
"""


class Command:
    """A command that runs, its helper and its server."""

    def __init__(self, folder: Path, ending: str, before_s: float = 0.0) -> None:
        self.folder = folder / "own"
        self.folder.mkdir()
        words = [sys.executable, "-c", SCRIPT, str(self.folder), ending, str(before_s)]
        self._process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        said = self._process.stdout.readline().split()
        self.pid = self._process.pid
        self.helper, self.server = map(int, said)
        if ending != "fails":  # which is over at once
            until(lambda: len(self.family()) >= 3)  # the server, the helper, and what that has started
        self._family = self.family()

    def family(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def complaint(self) -> str:
        """The next line of it."""
        assert self._process.stderr is not None
        return self._process.stderr.readline()

    def end(self) -> tuple[int, str, str]:
        """The exit code, what it said and what it complained; nothing may be left."""
        said, complained = self._process.communicate(timeout=PATIENCE_S)
        left = psutil.wait_procs(self._family, timeout=0)[1]
        for process in left:
            process.kill()
        assert left == []
        assert not self.folder.exists()
        return self._process.returncode, said, complained


def until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)])
@pytest.mark.parametrize("ending", ["starts", "serves"])
def test_a_signal_ends_all_and_lets_a_server_drain(
    tmp_path: Path, number: signal.Signals, code: int, ending: str
) -> None:
    command = Command(tmp_path, ending)
    os.kill(command.pid, number)
    ended, said, complained = command.end()
    assert ended == code
    assert ("drained" in said) == (ending == "serves")
    assert complained == ("" if ending == "serves" else "ended before the model was ready\n")


def test_a_second_signal_ends_at_once_what_does_not_end(tmp_path: Path) -> None:
    command = Command(tmp_path, "hangs", before_s=1000.0)
    os.kill(command.pid, signal.SIGTERM)
    assert command.complaint() == "ended before the model was ready\n"  # signals do not queue: two at once may be one
    os.kill(command.pid, signal.SIGTERM)
    assert command.end()[0] == 130


def test_an_end_has_its_time(tmp_path: Path) -> None:
    command = Command(tmp_path, "hangs", before_s=0.2)
    os.kill(command.pid, signal.SIGTERM)
    assert command.end()[::2] == (
        1,
        "ended before the model was ready\nthe server did not end in time, and is killed\n",
    )


def test_what_the_server_cannot_do_without_is_missed_at_once_and_named(tmp_path: Path) -> None:
    command = Command(tmp_path, "serves")
    os.kill(command.helper, signal.SIGKILL)
    assert command.end()[::2] == (1, f"the helper (process {command.helper}) is gone; the server ends\n")


def test_a_server_that_is_killed_is_named(tmp_path: Path) -> None:
    command = Command(tmp_path, "serves")
    os.kill(command.server, signal.SIGKILL)
    line = f"the server's own process (process {command.server}) is gone, killed by SIGKILL; the server ends\n"
    assert command.end()[::2] == (1, line)


def test_a_server_that_fails_has_said_why(tmp_path: Path) -> None:
    assert Command(tmp_path, "fails").end()[::2] == (7, "")


def test_what_is_stopped_goes_on(tmp_path: Path) -> None:
    command = Command(tmp_path, "serves")
    os.kill(command.helper, signal.SIGSTOP)
    until(lambda: psutil.Process(command.helper).status() == psutil.STATUS_STOPPED)
    until(lambda: psutil.Process(command.helper).status() == psutil.STATUS_SLEEPING)
    os.kill(command.pid, signal.SIGTERM)
    assert command.end()[::2] == (0, f"sleep (process {command.helper}) was stopped; resumed\n")


def test_a_command_that_is_killed_takes_all_with_it(tmp_path: Path) -> None:
    command = Command(tmp_path, "serves")
    family = command.family()
    os.kill(command.pid, signal.SIGKILL)
    left = psutil.wait_procs([each for each in family if each.pid != command.pid], timeout=PATIENCE_S)[1]
    assert left == []


def test_a_process_that_listens_and_never_answers_is_noticed() -> None:
    silent: Queue[Watched] = Queue()
    with socket.create_server(("127.0.0.1", 0)) as server:
        watched = Watched("the mute", os.getpid(), f"127.0.0.1:{server.getsockname()[1]}")
        HealthProbe(watched, silent.put, period_s=0.01, timeout_s=0.05)
        assert silent.get(timeout=PATIENCE_S) == watched
