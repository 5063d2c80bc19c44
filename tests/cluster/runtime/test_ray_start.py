"""How long and how often Ray's start is tried, which device ranks get, and what is said when they have no room."""

import pytest

from eagleray.cluster.config import EngineConfig
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


@pytest.mark.parametrize(
    ("size", "total", "asked", "remedy"),
    [
        (1, {"CPU": 8.0}, "for 1 rank of 1 CPU + 1 GPU, but", "add a node with GPUs, or run on CPU with --device cpu"),
        (
            2,
            {"CPU": 8.0},
            "for 2 ranks of 1 CPU + 1 GPU each, but",
            "add a node with GPUs, or run on CPU with --device cpu",
        ),
        (1, {"CPU": 8.0, "GPU": 1.0}, "for 1 rank of", "add nodes or end other jobs"),
        (4, {"CPU": 8.0, "GPU": 2.0}, "for 4 ranks of", "add nodes, or lower tensor_parallel_size to 2 or less"),
        (2, {"CPU": 8.0, "GPU": 2.0}, "for 2 ranks of", "add nodes, end other jobs, or lower tensor_parallel_size"),
    ],
)
def test_only_what_would_help_is_advised(
    size: int, total: dict[str, float], asked: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    monkeypatch.setattr("ray.available_resources", dict)
    monkeypatch.setattr("ray.nodes", lambda: [{}])
    message = placement._no_room(EngineConfig(model="model", tensor_parallel_size=size), {"CPU": 1.0, "GPU": 1.0})
    assert asked in message
    assert "the cluster of 1 node has" in message
    assert message.endswith(f"; {remedy}")


@pytest.mark.parametrize(
    ("asked", "total", "device", "bundle"),
    [
        ("auto", {"CPU": 8.0}, "cpu", {"CPU": 2.0}),
        ("auto", {"CPU": 8.0, "GPU": 0.0}, "cpu", {"CPU": 2.0}),
        ("auto", {"CPU": 8.0, "GPU": 1.0}, "cuda", {"CPU": 2.0, "GPU": 1.0}),
        ("cpu", {"CPU": 8.0, "GPU": 1.0}, "cpu", {"CPU": 2.0}),
        ("cuda", {"CPU": 8.0}, "cuda", {"CPU": 2.0, "GPU": 1.0}),
    ],
)
def test_ranks_get_what_was_asked_for_or_else_what_there_is(
    asked: str, total: dict[str, float], device: str, bundle: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: total)
    config = EngineConfig(model="model", device=asked, cpus_per_rank=2.0)
    assert placement.choose_device(config) == device
    assert placement.rank_resources(config, device) == bundle
