"""What Ray Serve's processes find in their environment, and the HAProxy that they start."""

import os
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import httpx
import psutil
import pytest
from ray.serve._private import constants

from eagleray.deploy.haproxy import COMMAND
from eagleray.deploy.serve_environment import FASTER_STREAMS, HAPROXY, PORTS, set_environment
from support.free_port import free_port

PATIENCE_S = 20.0
ANSWERS = """
defaults
    mode http
    timeout connect 5s
    timeout client 60s
    timeout server 60s
frontend all
    bind 127.0.0.1:{port}
    http-request return status 200
"""


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [*FASTER_STREAMS, *HAPROXY, *PORTS, "RAY_SERVE_HAPROXY_BINARY_PATH"]
    own = {names[0]: "mine", PORTS[0]: "1234"}
    monkeypatch.setattr(os, "environ", own)
    set_environment()
    assert own.keys() == set(names)
    assert (own[names[0]], own[PORTS[0]]) == ("mine", "1234")
    assert own.items() >= HAPROXY.items()
    assert len({own[port] for port in PORTS}) == len(PORTS)


def test_serve_knows_every_name() -> None:
    assert [name for name in [*FASTER_STREAMS, *HAPROXY, *PORTS] if not hasattr(constants, name)] == []


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "haproxy.cfg").write_text(ANSWERS.format(port=port))
    command = [str(Path(sysconfig.get_path("scripts")) / COMMAND), "-db", "-f", str(tmp_path / "haproxy.cfg")]
    script = f"import subprocess; subprocess.run({command!r})"
    starter = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert answer(port) == 200
        (haproxy,) = psutil.Process(starter.pid).children()
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.wait()
    left = psutil.wait_procs([haproxy], timeout=PATIENCE_S)[1]
    for process in left:
        process.kill()
    assert left == []


def answer(port: int) -> int:
    """The status of the first answer there, which may take a while to come."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}").status_code
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "nothing listens there"
            time.sleep(0.05)
