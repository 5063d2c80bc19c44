"""The Ray cluster that a server starts for itself: its processes, and cleaning up after it."""

import os
import secrets
import stat
from pathlib import Path
from typing import Any

from eagleray.deploy.serve.server_link import News, Watched

MODE, TOKEN = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"
NAMES = {"gcs_server": "Ray's GCS", "raylet": "Ray's raylet"}  # by what Ray calls them


def set_token() -> None:
    """Have Ray's processes ask each other for a token that nobody else has, unless the environment says otherwise.

    Without it Ray would make one for all its clusters, in a file that others may read.
    """
    if not os.environ.keys() & {MODE, TOKEN, f"{TOKEN}_PATH"}:
        os.environ |= {MODE: "token", TOKEN: secrets.token_hex(32)}


def set_place() -> None:
    """Have Ray put its files where nobody but this user may look: each of its processes lets everybody into its own.

    Raises `ValueError` if there can be no such folder.
    """
    folder = Path(os.environ.get("RAY_TMPDIR", "/tmp"), f"eagleray-{os.getuid()}")
    try:
        folder.mkdir(0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ValueError(f"{folder} cannot be made for Ray's files: {error.strerror}; set another RAY_TMPDIR") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ValueError(
            f"{folder} is not a folder that belongs to this user alone; remove it, or set another RAY_TMPDIR"
        )
    os.environ["RAY_TMPDIR"] = str(folder)


def private_ray() -> News:
    """Processes without which nothing works. Ray must have been started here."""
    import ray

    node = _node()
    health = {
        "gcs_server": str(node.gcs_address),
        "raylet": f"{node.node_ip_address}:{ray.nodes()[0]['NodeManagerPort']}",
    }
    watched = [
        Watched(name, info.process.pid, health[kind])
        for kind, name in NAMES.items()
        for info in node.all_processes[kind]
    ]
    return News(watched=tuple(watched))


def socket_folders(pid: int) -> list[Path]:
    """The folder with the sockets of a Ray that this process has started, or was about to start."""
    return list(Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray").glob(f"session_*_{pid}/sockets"))


def reap_ray() -> None:
    """Nobody else waits for Ray's helpers, should one end."""
    if (node := _node()) is not None:
        for infos in node.all_processes.values():
            for info in infos:
                info.process.poll()


def _node() -> Any:
    from ray._private import worker

    return worker._global_node
