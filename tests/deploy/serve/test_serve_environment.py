"""What Ray Serve's processes find in their environment, and the HAProxy that they start."""

import os
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from jinja2 import Environment
from ray.serve._private import constants
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from eagleray.deploy.serve import environment
from eagleray.deploy.serve.environment import FASTER_STREAMS, FILES, HAPROXY, ONE_SERVER, PORTS, set_environment
from eagleray.deploy.serve.haproxy import COMMAND, fixed
from eagleray.deploy.serve.private_ray import set_place
from support.free_port import free_port

PATIENCE_S = 20.0
NO_PROXIES = ("no_proxy", "NO_PROXY")
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
    assert own.keys() == {*names, *NO_PROXIES}
    assert (own[names[0]], own[PORTS[0]]) == ("mine", "1234")
    assert own.items() >= HAPROXY.items()
    assert len({own[port] for port in PORTS}) == len(PORTS)


def test_haproxys_files_are_in_the_servers_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(folder="/tmp/own")
    assert {Path(os.environ[name]).parts[:3] for name in FILES} == {("/", "tmp", "own")}


def test_from_source_there_is_a_command_for_haproxy_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is installed there, and Ray's processes may have another working directory and no path to the source."""
    monkeypatch.setattr(os, "environ", {"PATH": os.defpath})
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    set_environment(folder=str(tmp_path))
    command = os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]
    assert Path(command).parent == tmp_path
    done = subprocess.run([command, "-v"], env={}, cwd="/", capture_output=True, text=True, timeout=PATIENCE_S)
    assert "HAProxy version" in done.stdout, done.stderr


def test_serve_knows_every_name() -> None:
    known = Path(constants.__file__).read_text()
    assert [name for name in [*FASTER_STREAMS, *HAPROXY, *PORTS, *FILES, *ONE_SERVER] if f'"{name}"' not in known] == []


@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6_is_for_serves_own_proxy(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(os, "environ", {})
    set_environment(host)
    assert os.environ.keys() == {*FASTER_STREAMS, *NO_PROXIES}


@pytest.mark.parametrize("given", ["", "example.com,127.0.0.1"])
def test_what_is_on_this_machine_is_reached_without_the_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    monkeypatch.setattr(os, "environ", {"http_proxy": "http://proxy", "no_proxy": given})
    for _ in range(2):
        set_environment()
    expected = sorted({*filter(None, given.split(",")), "localhost", "127.0.0.1", "::1"})
    assert sorted(os.environ["no_proxy"].split(",")) == expected


@pytest.mark.parametrize("max_files", [4096, 1200])
def test_haproxy_starts_under_any_limit_on_open_files(tmp_path: Path, max_files: int) -> None:
    """With Serve's number of clients it would end at once."""
    with haproxy(tmp_path, f"ulimit -n {max_files}; exec") as (_, port):
        assert answer(port) == 200


HOSTS = {"127.0.0.1": "127.0.0.1:81", "*": "*:81", "10.0.0.1": "10.0.0.1:81"}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("hide_routes", [False, True])
def test_haproxys_socket_is_its_owners_and_its_figures_stay_on_the_machine(host: str, hide_routes: bool) -> None:
    """Whatever it serves at."""
    environment = Environment()
    environment.filters["haproxy_fmt"] = str
    about = {
        "socket_path": "/tmp/x/admin.sock",
        "metrics_port": 9101,
        "stats_port": 8404,
        "frontend_host": host,
        "frontend_port": 81,
    }
    config = environment.from_string(HAPROXY_CONFIG_TEMPLATE).render(config=about, route_info={"status": 200})
    lines = [line.strip() for line in fixed(config, hide_routes=hide_routes).splitlines()]
    assert [line for line in lines if line.startswith("stats socket")] == [
        "stats socket /tmp/x/admin.sock mode 600 level admin expose-fd listeners"
    ]
    binds = [line.removeprefix("bind ") for line in lines if line.startswith("bind ")]
    assert binds == ["127.0.0.1:9101", HOSTS[host], "127.0.0.1:8404"]
    (routes,) = (line for line in lines if (line.endswith("if routes") and " return " in line) or " deny " in line)
    assert ("deny_status 404" in routes) == hide_routes


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


def test_rays_files_are_put_where_nobody_else_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / f"eagleray-{os.getuid()}"
    for _ in range(2):  # one folder for all servers of a user
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
        set_place()
        assert os.environ["RAY_TMPDIR"] == str(own)
        assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o755)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(ValueError, match="is not a folder that belongs to this user alone; remove it"):
        set_place()
    own.rmdir()
    own.symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is not a folder that belongs to this user alone"):
        set_place()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    with pytest.raises(ValueError, match=r"/proc/nowhere/eagleray-.* cannot be made for Ray's files"):
        set_place()


def test_ports_for_later_are_free_and_none_that_a_connection_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    first_of_connections = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert len({*environment.free_ports(20)}) == 20
    assert max(environment.free_ports(20)) < first_of_connections
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(environment, "OWN_PORTS", range(port - 1, port + 2))
        assert port not in environment.free_ports(1)
        with pytest.raises(RuntimeError, match=r"^3 ports are needed, and only "):
            environment.free_ports(3)
