"""Ray Serve's environment variables for streams of small events, set where `eagleray serve` starts Ray itself.

Serve reads these from the environment of its processes, which is that of Ray's nodes. Where Ray runs already they must
have been there when it started: `docs/deployment.md` says how. What the user has set stays.
"""

import os
import random
import shlex
import shutil
import socket
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from eagleray.deploy.serve import haproxy
from eagleray.deploy.serve.haproxy import COMMAND, bundled

FASTER_STREAMS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # the replica waits for nothing but its event loop
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # events go from replica to proxy over gRPC, and not as Ray objects
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",  # lines; an error writes them at once
}
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",  # requests go straight to a replica's own port
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy has noticed after two looks, 250 ms apart
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",  # streams go on that began before replicas came or went
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",  # after three looks that find HAProxy dead, Serve starts it again
}
ONE_SERVER = {  # a first start that fails would fail again; once one was well, Serve tries for ever
    "RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT": "1"
}
FILES = {  # of HAProxy, by their names within the folder of one server
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": "metrics.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}
NO_PROXY = ("localhost", "127.0.0.1", "::1")  # what is here is reached without, whatever the environment says
# Linux gives connections ports from 32768 on, Ray its workers those from 10002, Serve its replicas those from 30000 on.
OWN_PORTS = range(20_000, 30_000)
PORTS = (  # of HAProxy; Serve's own numbers would let one server run on a machine
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)


def set_environment(host: str = "127.0.0.1", folder: str | None = None) -> None:
    """Set variables for Ray processes that this one starts, with Serve to listen at `host`.

    If these are for one server alone, HAProxy's files are in its `folder`.
    """
    for name in ("no_proxy", "NO_PROXY"):
        named = [each for each in os.environ.get(name, "").split(",") if each]
        os.environ[name] = ",".join([*named, *(each for each in NO_PROXY if each not in named)])
    for name, value in variables(host, folder).items():
        os.environ.setdefault(name, value)


def variables(host: str = "127.0.0.1", folder: str | None = None) -> dict[str, str]:
    """Ray Serve's, as `set_environment` sets them where nothing is set."""
    proxy = {} if ":" in host else _haproxy(folder)  # Serve's stand-in for IPv6 listens where its HAProxy does not look
    own = {}
    if folder is not None:
        own = ONE_SERVER | ({name: os.path.join(folder, file) for name, file in FILES.items()} if proxy else {})
    return FASTER_STREAMS | proxy | own


def _haproxy(folder: str | None) -> dict[str, str]:
    """Nothing where there is no HAProxy: Serve's proxy in Python does the same, slower and at more cost."""
    if bundled() is None:
        return {}
    here = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    command = shutil.which(COMMAND, path=os.pathsep.join(here))
    if command is None and folder is not None:
        command = _write_command(Path(folder) / COMMAND)
    if command is None:
        return {}
    ports = map(str, free_ports(len(PORTS)))
    return HAPROXY | {"RAY_SERVE_HAPROXY_BINARY_PATH": command} | dict(zip(PORTS, ports, strict=True))


def _write_command(file: Path) -> str:
    """The command that an installation has, for an Eagleray that runs from its source."""
    root = Path(haproxy.__file__).parents[3]  # of the package's folder
    run = f"import sys; sys.path.insert(0, {str(root)!r}); from {haproxy.__name__} import main; main()"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c {shlex.quote(run)} "$@"\n')
    file.chmod(0o700)
    return str(file)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, no two the same, for processes that will listen there some seconds later.

    Not of those that Linux gives to connections, one of which might take it meanwhile. Raises `RuntimeError` if there
    are too few.
    """
    found: list[int] = []
    for port in random.sample(OWN_PORTS, len(OWN_PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"{count} ports are needed, and only {len(found)} of {OWN_PORTS[0]} to {OWN_PORTS[-1]} are free")
