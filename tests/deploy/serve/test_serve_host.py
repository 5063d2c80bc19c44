"""A server as `eagleray serve` starts it among strangers: ports, sockets, keys, what it leaves. One for all tests."""

import os
import re
import signal
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from support.processes import command_line
from support.served_command import ServedCommand, complaints
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

GUIDE = Path(__file__).parents[3] / "docs" / "ports.md"
KEY = "sk-of-the-environment"
NOWHERE = "http://127.0.0.1:9"  # a proxy that refuses
ENVIRONMENT = {"EAGLERAY_API_KEY": KEY} | dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), NOWHERE
)
PATIENCE_S = 60.0


@pytest.fixture(scope="module")
def taken_before() -> set[int]:
    """Ports that the server cannot have."""
    return taken_by_others([])


@pytest.fixture(scope="module")
def server(taken_before: set[int], tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedCommand]:
    """It answers, though the environment names a proxy, which is for others."""
    model = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    with ServedCommand(model, "--guard-all", environment=ENVIRONMENT) as command:
        command.wait_until_it_answers()
        yield command


def get(server: ServedCommand, path: str, key: str | None = None) -> int:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    return httpx.get(f"{server.url}{path}", headers=headers, timeout=PATIENCE_S, trust_env=False).status_code


@pytest.mark.parametrize(
    ("path", "without", "status"),
    [
        ("/health", 200, 200),
        ("/ping", 200, 200),
        ("/-/healthz", 200, 200),
        ("/", 401, 200),
        ("/metrics", 401, 200),
        ("/v1/models", 401, 200),
        ("/docs", 401, 200),
        ("/-/routes", 404, 404),
    ],
)
def test_all_but_health_is_guarded_on_request(server: ServedCommand, path: str, without: int, status: int) -> None:
    assert get(server, path) == without
    assert get(server, path, KEY) == status


def test_no_key_is_seen_on_command_lines_in_logs_or_by_rays_processes(server: ServedCommand) -> None:
    family = server.family()
    assert not any(KEY in command_line(process) for process in family)
    below = [process for process in family if process.ppid() != server.process.pid]
    assert not any(KEY in "".join(process.environ().values()) for process in below)
    for file in server.folder.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), file


def test_the_guides_table_says_who_listens_and_nobody_else_does(server: ServedCommand, taken_before: set[int]) -> None:
    row = re.compile(r"^\| `([^`]+)` \| (?:`--host`|loopback).*? \| (\d.*?) \| (.*) \|", re.MULTILINE)
    family = server.family()
    found: Counter[str] = Counter()
    addresses, own_ports = set(), set()
    for process in family:
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                found[called(process, server)] += 1
                addresses.add(connection.laddr.ip.removeprefix("::ffff:"))
                own_ports.add(connection.laddr.port)
    taken = (taken_before | taken_by_others(family)) - own_ports
    promised: Counter[str] = Counter()
    for name, ports, what in row.findall(GUIDE.read_text()):
        numbers = [int(number) for number in re.findall(r"\d+", ports.replace("rank 0", ""))]
        promised[name] += 2 * numbers[0] + numbers[1] if name == "ray::RankActor" else numbers[0]
        promised[name] -= len(taken & {int(port) for port in re.findall(r" at (\d{5})", what)})
    assert found == promised
    assert addresses == {"127.0.0.1"}


def taken_by_others(family: list[psutil.Process]) -> set[int]:
    pids = {process.pid for process in family}
    listening = [each for each in psutil.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
    return {connection.laddr.port for connection in listening if connection.pid not in pids}


def called(process: psutil.Process, server: ServedCommand) -> str:
    """As the guide calls it."""
    line = command_line(process)
    if process.ppid() == server.process.pid:
        return "eagleray serve"
    for script in ("dashboard.py", "monitor.py"):
        if f"{script} " in line and "log_monitor" not in line:
            return script
    found = re.match(r"ray::\w+", line)
    return found[0] if found else os.path.basename(line.split()[0])


def test_rays_processes_ask_for_a_token_of_this_server_alone(server: ServedCommand) -> None:
    (raylet,) = server.named("raylet")
    about = raylet.environ()
    assert (about["RAY_AUTH_MODE"], len(about["RAY_AUTH_TOKEN"])) == ("token", 64)


def test_nobody_else_opens_a_socket_of_haproxys_or_of_the_engines(server: ServedCommand) -> None:
    (own,) = server.own_folders()
    assert list(server.folder.glob(f"eagleray-{os.getuid()}/ray/session_*/sockets/raylet"))
    for folder in (own, *server.folder.glob("eagleray-*")):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (admin,) = own.rglob("admin.sock")
    assert stat.S_IMODE(admin.stat().st_mode) == 0o600
    assert not Path("/tmp/haproxy-serve/admin.sock").exists()


def test_without_its_raylet_the_command_ends_within_seconds_and_leaves_nothing(server: ServedCommand) -> None:
    """The last test here: it ends the server."""
    (raylet,) = server.named("raylet")
    os.kill(raylet.pid, signal.SIGKILL)
    assert server.process.wait(PATIENCE_S) == 1
    assert complaints(server.log.read_text())[-1] == f"Ray's raylet (process {raylet.pid}) is gone; the server ends"
    assert server.left() == []
