"""What Ray Serve's processes find in their environment, and the HAProxy that they start."""

import os
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
global
    maxconn 4096
defaults
    mode http
    option splice-request
    option splice-response
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
    known = Path(constants.__file__).read_text()
    assert [name for name in [*FASTER_STREAMS, *HAPROXY, *PORTS] if f'"{name}"' not in known] == []


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_is_for_serves_own_proxy(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(host)
    assert os.environ.keys() == FASTER_STREAMS.keys()


@pytest.mark.parametrize("max_files", [4096, 1200])
def test_haproxy_starts_under_any_limit_on_open_files(tmp_path: Path, max_files: int) -> None:
    """With Serve's number of clients it would end at once."""
    with haproxy(tmp_path, f"ulimit -n {max_files}; exec") as (_, port):
        assert answer(port) == 200


def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    with haproxy(tmp_path, "") as (starter, port):
        assert answer(port) == 200
        (started,) = psutil.Process(starter.pid).children()
        starter.kill()
        starter.wait()
        left = psutil.wait_procs([started], timeout=PATIENCE_S)[1]
        for process in left:
            process.kill()
        assert left == []


@contextmanager
def haproxy(directory: Path, before: str) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """The process of a shell that starts it, or becomes it, and its port."""
    port = free_port()
    config = directory / "haproxy.cfg"
    config.write_text(ANSWERS.format(port=port))
    command = Path(sysconfig.get_path("scripts")) / COMMAND
    process = subprocess.Popen(["bash", "-c", f"{before} {command} -db -f {config}; true"])
    try:
        yield process, port
    finally:
        process.kill()
        process.wait()


def answer(port: int) -> int:
    """The status of the first answer there, which may take a while to come."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return httpx.get(f"http://127.0.0.1:{port}").status_code
        except httpx.ConnectError:
            assert time.monotonic() < deadline, "nothing listens there"
            time.sleep(0.05)
