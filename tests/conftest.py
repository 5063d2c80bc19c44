"""Fixtures that every room's tests may use."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from eagleray.deploy.serve.environment import set_environment
from eagleray.deploy.serve.private_ray import set_token
from eagleray.models.loading.demo_model import demo_model
from support.rank_pool import RunRanks, rank_pool

settings.register_profile("without clocks", settings(), deadline=None)  # a busy machine is no fault of the code
settings.load_profile("without clocks")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other, long where others have the cores
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or hundreds of processes would compile the package, each for itself
set_token()  # before anything imports Ray, which would write one into the home of whoever runs this


# Tests that share what is started for them, by the beginnings of their files' names: one worker runs all of a list, and
# the lists that take longest come first. All others go a file at a time.
SHARING = {
    "cluster": ["cluster/runtime", "deploy/openai", "deploy/bench", "deploy/profile", "test_demo_model_against"],
    "commands": ["deploy/cli", "deploy/serve/test_serve_command", "deploy/serve/test_serve_host"],  # Rays of their own
    "batch": ["deploy/batch"],
    "serve": [f"deploy/serve/test_{name}" for name in ("many_", "serve.", "serve_demo", "serve_replicas", "serve_run")],
    "ranks": ["models/test_against", "models/test_compile", "models/test_sinks", "parallel/test_collectives"],
}
GROUPS = list(SHARING)


def group_of(nodeid: str) -> str:
    file = nodeid.partition("::")[0].removeprefix("tests/")
    return next((name for name, places in SHARING.items() if file.startswith(tuple(places))), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    """In place of `--dist loadgroup`, which with pytest 9.2 ignores groups: pytest-xdist's issue 1386."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduler(LoadScopeScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False  # in the order of the tests, and not the fullest group first
    return Scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups come first, then files that start engines: at the end, one worker would wait for the other."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")

    def place(item: pytest.Item) -> tuple[int, bool]:
        group = group_of(item.nodeid)
        return GROUPS.index(group) if group in GROUPS else len(GROUPS), item.get_closest_marker("engine") is None

    items.sort(key=place)


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model, SmolLM2-135M-Instruct in float32, converted on first use."""
    return demo_model()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster whose logical CPUs suffice for three ranks on any machine."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  or whatever else runs here slows the ranks
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="haproxy-") as folder:  # short, since sockets lie there
        set_environment(folder=folder)  # Ray Serve as `eagleray serve` has it
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        yield
        ray.shutdown()


SUPPORT = Path(__file__).parent / "support"
NUM_RANKS = 4


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunRanks]:
    """Runs the tasks of `support/rank_process.py` on CPU."""
    with rank_pool(SUPPORT / "rank_process.py", NUM_RANKS, tmp_path_factory.mktemp("ranks")) as run:
        yield run
