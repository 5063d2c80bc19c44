"""A Ray cluster as `ray start` makes it, for programs that join it from outside."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eagleray.deploy.serve.environment import variables as serve_variables
from support.free_port import free_port

NUM_CPUS = 8  # logical ones, so that two engines fit on any machine
START_S = 90.0
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """Where it is, and the process that keeps it."""

    environment: dict[str, str]  # of programs that join it
    dashboard: str | None  # for `ray job submit --address`
    pid: int


@contextmanager
def running_cluster(variables: Mapping[str, str] = {}, *, dashboard: bool = False) -> Iterator[Cluster]:
    """Its workers, its jobs and the programs that join it share an environment, and with that its token.

    `variables` are added to it. The cluster has a directory of its own, where programs and jobs would otherwise find
    other clusters of the machine. Jobs need its `dashboard`, a dozen processes that nothing else needs.
    """
    directory = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, since sockets lie there
    port = free_port()
    os.mkdir(haproxy := f"{directory}/haproxy")  # whose files and ports are this cluster's alone
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= serve_variables(folder=haproxy) | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # jobs run `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_TMPDIR": directory,
        "RAY_worker_niceness": "0",
        **variables,
    }
    ports = [f"--port={free_port()}", f"--dashboard-port={port}", f"--ray-client-server-port={free_port()}"]
    options = [f"--num-cpus={NUM_CPUS}", f"--include-dashboard={str(dashboard).lower()}", f"--temp-dir={directory}"]
    command = [str(BIN / "ray"), "start", "--head", "--block", *ports, *options, "--dashboard-agent-listen-port=0"]
    log = Path(directory, "start.log")
    with log.open("w") as out, subprocess.Popen(command, env=environment, stdout=out, stderr=out) as process:
        try:
            address = _address(Path(directory, "ray_current_cluster"), process, log)
            url = f"http://127.0.0.1:{port}" if dashboard else None
            yield Cluster(environment | {"RAY_ADDRESS": address}, url, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)  # its own processes end with it, and no others
            process.wait(60)
            shutil.rmtree(directory, ignore_errors=True)


def _address(file: Path, process: "subprocess.Popen[bytes]", log: Path) -> str:
    """What `ray start` writes there once the cluster is up, a moment after it has said so."""
    deadline = time.monotonic() + START_S
    while "Ray runtime started" not in log.read_text() or not file.exists() or not file.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return file.read_text().strip()
