"""How long and how often Ray's start is tried."""

import pytest

from eagleray.cluster.runtime import placement
from eagleray.cluster.runtime.placement import start_patiently


class SlowRay:
    """Starts at its n-th attempt."""

    def __init__(self, attempts: int) -> None:
        self.failures_left = attempts - 1
        self.did: list[str] = []

    def start(self) -> None:
        self.did.append("start")
        if self.failures_left:
            self.failures_left -= 1
            raise RuntimeError("The current node timed out during startup.\nMore of it.")

    def clear(self) -> None:
        self.did.append("clear")


def test_a_start_that_has_waited_in_vain_is_tried_again_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(placement, "RAY_WAITED_S", 0.0)  # which every attempt takes
    ray = SlowRay(attempts=3)
    start_patiently(ray.start, ray.clear, timeout_s=60)
    assert ray.did == ["start", "clear", "start", "clear", "start"]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    words = "Ray has not started within its own limits (The current node timed out during startup.); trying again, for "
    assert all(line.startswith(words) for line in lines)


@pytest.mark.parametrize(("waited_s", "timeout_s"), [(1000.0, 60.0), (0.0, 0.0)])
def test_what_fails_at_once_or_is_out_of_time_fails(
    monkeypatch: pytest.MonkeyPatch, waited_s: float, timeout_s: float
) -> None:
    monkeypatch.setattr(placement, "RAY_WAITED_S", waited_s)
    ray = SlowRay(attempts=9)
    with pytest.raises(RuntimeError, match="timed out during startup"):
        start_patiently(ray.start, ray.clear, timeout_s)
    assert ray.did == ["start", "clear"]
