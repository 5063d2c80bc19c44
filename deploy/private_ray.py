"""The Ray that this process has started for itself: which processes it is, and what it leaves."""

from pathlib import Path
from typing import Any

from eagleray.deploy.server_link import News, Watched

NAMES = {"gcs_server": "Ray's GCS", "raylet": "Ray's raylet"}  # by what Ray calls them


def private_ray() -> News:
    """Processes without which nothing goes on, and where their sockets lie. Ray must have been started here."""
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
    return News(watched=tuple(watched), folders=(str(Path(node.get_session_dir_path(), "sockets")),))


def reap_ray() -> None:
    """Nobody else waits for Ray's helpers, should one end."""
    if (node := _node()) is not None:
        for infos in node.all_processes.values():
            for info in infos:
                info.process.poll()


def _node() -> Any:
    from ray._private import worker

    return worker._global_node
