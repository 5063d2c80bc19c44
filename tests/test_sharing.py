"""Tests that share what is started for them run on one worker."""

from pathlib import Path
from typing import Any

import pytest

from support.sharing import SHARING, group_of, scheduler

HERE = Path(__file__).parent


@pytest.mark.parametrize("place", [place for places in SHARING.values() for place in places])
def test_a_group_has_the_tests_that_it_names(place: str) -> None:
    files = [file.relative_to(HERE).as_posix() for file in HERE.rglob("test_*.py")]
    found = [file for file in files if file.startswith(place)]
    assert found
    assert {group_of(f"tests/{file}::test_it[a@b]") for file in found} <= set(SHARING)


class Worker:
    """One of pytest-xdist, which notes what it is to run."""

    def __init__(self, name: str) -> None:
        self.gateway = type("Gateway", (), {"id": name})
        self.shutting_down = False
        self.indexes: list[int] = []

    def send_runtest_some(self, indexes: list[int]) -> None:
        self.indexes += indexes

    def shutdown(self) -> None:
        self.shutting_down = True


def test_a_group_goes_to_one_worker_and_a_file_to_one(pytestconfig: pytest.Config) -> None:
    pytest.importorskip("xdist")
    names = [f"tests/deploy/batch/test_{name}.py::test_{number}" for name in "ab" for number in range(4)]
    names += [f"tests/test_{name}.py::test_{number}[x@y]" for name in "ab" for number in range(4)]
    config: Any = type("Config", (), {"option": pytestconfig.option, "getvalue": lambda *_: ["2*popen"]})()
    hands_out = scheduler(config, None)
    workers = [Worker("gw0"), Worker("gw1")]
    for worker in workers:
        hands_out.add_node(worker)
        hands_out.add_node_collection(worker, names)
    hands_out.schedule()
    assert workers[0].indexes == list(range(8))
    assert workers[1].indexes == list(range(8, 12))
