"""Decides which Ray cluster to join."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for programs that were submitted as jobs
GCS = b"--gcs-address="
LOCAL = "local"  # what RAY_ADDRESS says for a cluster of this process alone


def cluster_address() -> str | None:
    """That of the job that this process belongs to, else RAY_ADDRESS, else what `ray start` left on this machine.

    None if there is none. "local" in RAY_ADDRESS means the same and comes first.
    """
    named = os.environ.get("RAY_ADDRESS") or None
    own = _of_job() if IN_A_JOB in os.environ and named != LOCAL else None
    return own or named or _left_by_ray_start()


def how_found() -> tuple[str, str]:
    """How `cluster_address` came to an address, and what to do where that cannot be joined; in words."""
    named = os.environ.get("RAY_ADDRESS") or None
    if IN_A_JOB in os.environ and named != "local" and _of_job():
        return "of the job that this process belongs to", "submit the job again"
    if named:
        return "named by RAY_ADDRESS", "start it, or unset RAY_ADDRESS"
    file = _left_by_ray_start_at()
    return f"made by `ray start`, which wrote {file}", "end it with `ray stop`, or set RAY_ADDRESS=local to leave it"


def is_tcp(address: str) -> bool:
    """Whether it is HOST:PORT."""
    host, _, port = address.rpartition(":")
    return "/" not in host and port.isdigit()


def answers(address: str, timeout_s: float = 5.0) -> bool:
    """Whether something listens at HOST:PORT. Other forms of addresses, such as "auto", are Ray's to judge."""
    host, _, port = address.rpartition(":")
    if not is_tcp(address):
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except (OSError, OverflowError):
        return False
    return True


def _of_job() -> str | None:
    """The address of the cluster whose raylet is an ancestor of this process.

    Ray sets RAY_ADDRESS for a job, but to a guess: with several clusters on the machine, it takes what `ray start` has
    last written to a file, even if that cluster is long gone or another.
    """
    for words in _ancestors(os.getpid()):
        if words[0].endswith(b"/raylet"):
            return next((word.removeprefix(GCS).decode() for word in words if word.startswith(GCS)), None)
    return None


def _ancestors(pid: int) -> Iterator[list[bytes]]:
    """The command lines of a process, its parent and so on, as far as they can be read."""
    while pid > 0:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            status = Path(f"/proc/{pid}/stat").read_bytes()
        except OSError:
            return
        yield words
        pid = int(status.rpartition(b")")[2].split()[1])  # behind the name, which may hold anything: state and parent


def _left_by_ray_start() -> str | None:
    """The address of the cluster that `ray start` made on this machine, if it still answers.

    `ray.init(address="auto")` would also join the private cluster of another process, and wait a minute for one that
    was killed.
    """
    try:
        address = _left_by_ray_start_at().read_text().strip()
    except (OSError, ValueError):
        return None
    return address if ":" in address and answers(address, 1) else None


def _left_by_ray_start_at() -> Path:
    """Where Ray's temporary files are, as Ray finds them."""
    place = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(place, "ray", "ray_current_cluster")
