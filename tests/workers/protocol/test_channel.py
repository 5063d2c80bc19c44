"""The channel's sockets on one node: what a killed process leaves behind goes away, and nothing else."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray.workers.protocol.channel import Hub, Peer

HUB_ELSEWHERE = """
import time
from eagleray.workers.protocol.channel import Hub
hub = Hub()
print(hub.endpoint.address, flush=True)
time.sleep(100)
"""


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for temporary files that no engine of this machine uses."""
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:  # short, since sockets lie there
        monkeypatch.setenv("TMPDIR", directory)
        monkeypatch.setattr(tempfile, "tempdir", None)
        yield Path(directory)


def grow_old(directory: Path) -> None:
    an_hour_ago = time.time() - 3600
    os.utime(directory, (an_hour_ago, an_hour_ago))


def start_another() -> None:
    Hub().close()


def test_a_hub_removes_the_sockets_of_killed_processes_and_no_others(temporary: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HUB_ELSEWHERE], stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    places = []
    for process in processes:
        assert process.stdout is not None
        places.append(Path(process.stdout.readline().strip().removeprefix("ipc://")).parent)
        process.stdout.close()
    killed, stopped = places
    processes[0].kill()
    processes[0].wait()
    processes[1].send_signal(signal.SIGSTOP)
    start_another()
    assert killed.exists(), "it is too young to be judged"
    for place in places:
        grow_old(place)
    start_another()
    assert (killed.exists(), stopped.exists()) == (False, True)
    processes[1].kill()
    processes[1].wait()
    start_another()
    assert not list(temporary.iterdir())


def test_where_temporary_files_lie_too_deep_for_sockets_a_shorter_place_is_taken(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = temporary / ("d" * 87)
    deep.mkdir()
    for place in (temporary, deep):
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        hub = Hub()
        path = Path(hub.endpoint.address.removeprefix("ipc://"))
        assert path.parent.parent == (temporary if place == temporary else Path("/tmp"))
        assert path.parent.stat().st_mode & 0o777 == 0o700
        peer = Peer(hub.endpoint, b"rank 0")
        peer.send(b"hello")
        assert hub.socket.poll(5000)
        assert hub.receive() == (b"rank 0", b"hello")
        peer.close()
        hub.close()
        assert not path.parent.exists()


def test_without_a_shorter_place_the_remedy_is_said(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("d" * 87)))
    monkeypatch.setattr(os, "access", lambda *_: False)  # this user cannot write to /tmp
    with pytest.raises(ValueError, match="set a shorter TMPDIR"):
        Hub()


def test_what_looks_alike_but_is_something_else_stays(temporary: Path) -> None:
    (temporary / "eagleray-file").write_text("mine")
    (temporary / "eagleray-empty").mkdir()
    for name in ("eagleray-more", "elsewhere"):
        (temporary / name).mkdir()
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(temporary / name / "hub"))
    (temporary / "eagleray-more" / "notes").write_text("mine")
    (temporary / "eagleray-link").symlink_to(temporary / "elsewhere")
    before = sorted(temporary.rglob("*"))
    for path in temporary.iterdir():
        grow_old(path)
    start_another()
    assert sorted(temporary.rglob("*")) == before


def test_a_hub_that_others_look_at_goes_on() -> None:
    hub = Hub()
    grow_old(Path(hub.endpoint.address.removeprefix("ipc://")).parent)
    start_another()
    peer = Peer(hub.endpoint, b"rank 0")
    peer.send(b"hello")
    assert hub.socket.poll(5000)
    assert hub.receive() == (b"rank 0", b"hello")
    hub.send(b"rank 0", b"you too")
    assert peer.receive(5) == b"you too"
    peer.close()
    hub.close()
