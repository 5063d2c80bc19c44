"""Probes Ray's processes over gRPC health checks, as they probe each other."""

import threading
from collections.abc import Callable

from eagleray.deploy.serve.server_link import Watched

PERIOD_S = 2.0
TIMEOUT_S = 5.0
MAX_SILENCES = 3  # in a row; a machine with too much to do may be late once
CHECK = "/grpc.health.v1.Health/Check"
NO_PROXY = (("grpc.enable_http_proxy", 0),)


class HealthProbe:
    """Calls `on_silence` once, from a thread of its own, if there was no answer three times in a row."""

    def __init__(
        self,
        watched: Watched,
        on_silence: Callable[[Watched], None],
        period_s: float = PERIOD_S,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self._watched = watched
        self._on_silence = on_silence
        self._period_s = period_s
        self._timeout_s = timeout_s
        self._over = threading.Event()
        threading.Thread(target=self._ask, name=f"health of {watched.name}", daemon=True).start()

    def close(self) -> None:
        self._over.set()

    def _ask(self) -> None:
        import grpc  # late: it takes a moment that no start should wait for

        channel = grpc.insecure_channel(self._watched.health, options=NO_PROXY)
        check = channel.unary_unary(CHECK)
        silences = 0
        while not self._over.wait(self._period_s):
            try:
                check(b"", timeout=self._timeout_s)
                silences = 0
            except grpc.RpcError:
                silences += 1
                if silences == MAX_SILENCES and not self._over.is_set():
                    self._on_silence(self._watched)
                    return
