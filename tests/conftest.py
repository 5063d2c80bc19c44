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
from support.interpreter_pool import RunFile, interpreter
from support.rank_pool import RunRanks, rank_pool
from support.sharing import place, scheduler

settings.register_profile("without clocks", settings(), deadline=None)  # a busy machine is no fault of the code
settings.load_profile("without clocks")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads wait for each other, long where others have the cores
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or hundreds of processes would compile the package, each for itself
set_token()  # before anything imports Ray, which would write one into the home of whoever runs this


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return scheduler(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
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


@pytest.fixture(scope="session")
def run_in_interpreter() -> Iterator[RunFile]:
    """Runs a file of tests in the process that is Triton's interpreter."""
    with interpreter() as run:
        yield run
