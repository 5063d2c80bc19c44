"""A Ray cluster with a dashboard in a process of its own, for programs that join it from outside.

Run as a script it starts the cluster, says where it is, and keeps it until standard input ends.
"""

import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

NUM_CPUS = 8  # logical ones, so that two engines fit on any machine


@dataclass(frozen=True)
class Cluster:
    """Where it is, and the process that keeps it."""

    environment: dict[str, str]  # of programs that join it
    dashboard: str  # for `ray job submit --address`
    pid: int


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Its workers, its jobs and the programs that join it share an environment, and with that its token."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # jobs run `python`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            places = next(line for line in process.stdout if line.startswith("["))
            address, dashboard = json.loads(places)
            yield Cluster(environment | {"RAY_ADDRESS": address}, dashboard, process.pid)
        finally:
            process.stdin.close()
            process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


if __name__ == "__main__":
    os.environ.pop("RAY_ADDRESS", None)
    context: Any = ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=True, dashboard_port=free_port())
    print(json.dumps([context.address_info["gcs_address"], f"http://{context.dashboard_url}"]), flush=True)
    sys.stdin.read()
    ray.shutdown()
