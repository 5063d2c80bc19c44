"""Measures where the time of a server's start goes, from the command to its first answer."""

import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPResponse

from prometheus_client.parser import text_string_to_metric_families

IMPORTS, RAY, SERVE, REPLICA, ENGINE, ANSWER = "imports", "Ray", "Serve", "replica process", "engine", "first answer"
START_METRIC = "eagleray_start_seconds"  # of a replica, by part; `BEFORE_ENGINE` and the parts of its engine
BEFORE_ENGINE = "before the engine"


class Laps:
    """A stopwatch; a part that comes again is added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def end(self, part: str) -> None:
        """Count the time since the last part as this one."""
        now = time.monotonic()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now


def open_here(url: str, timeout_s: float, key: str | None = None) -> HTTPResponse:
    """Ask a server of this machine, whatever proxy the environment names for others. Raises `OSError`."""
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    answer: HTTPResponse = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s)
    return answer


def replica_parts(url: str, timeout_s: float, key: str | None = None) -> dict[str, float]:
    """The parts of a replica's own start, from its metrics; none if another server answers."""
    with open_here(f"{url}/metrics", timeout_s, key) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        samples = [sample for family in families for sample in family.samples if sample.name == START_METRIC]
    return {sample.labels["part"]: sample.value for sample in samples}


def line(seconds: Mapping[str, float], replica: Mapping[str, float]) -> str:
    """`ready in 25.1 s: imports 1.8, Ray 7.0, …, engine 8.6 (processes and imports 6.2, …), first answer 0.0`.

    The engine's start is part of what the replica took.
    """
    engine = {part: value for part, value in replica.items() if part != BEFORE_ENGINE}
    parts = []
    for part, value in seconds.items():
        if part == REPLICA:
            parts.append(f"{part} {max(0.0, value - sum(engine.values())):.1f}")
            parts += [f"{ENGINE} {sum(engine.values()):.1f} ({_listed(engine)})"] if engine else []
        else:
            parts.append(f"{part} {value:.1f}")
    return f"ready in {sum(seconds.values()):.1f} s: {', '.join(parts)}"


def _listed(seconds: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {value:.1f}" for part, value in seconds.items())
