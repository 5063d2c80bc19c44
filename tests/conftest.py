"""Fixtures that every room's tests may use."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


# Tests of engines that share what is started for them, by the beginnings of their files' names: one worker runs a list.
SHARING = {
    "cluster": ["cluster/runtime", "deploy/openai", "deploy/bench", "deploy/profile", "test_demo_model_against"],
    "batch": ["deploy/batch"],
    "serve": [f"deploy/serve/test_{name}" for name in ("many_", "serve.", "serve_demo", "serve_replicas", "serve_run")],
    "commands": ["deploy/cli", "deploy/serve/test_serve_command", "deploy/serve/test_serve_host"],  # Rays of their own
}
RANKS = "ranks"  # what runs on the processes of `run_ranks`
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """pytest-xdist is to hand groups out in the order of `pytest_collection_modifyitems`, and not the fullest first."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups that take long come first, or one worker would wait for the other at the end: engines, then ranks."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: (item.get_closest_marker("engine") is None, group_of(item) != RANKS))


def group_of(item: pytest.Item) -> str:
    """By what it shares with others, or else by its file."""
    file = item.path.relative_to(HERE).as_posix()
    if item.get_closest_marker("engine"):
        return next((name for name, places in SHARING.items() if file.startswith(tuple(places))), file)
    return RANKS if "run_ranks" in getattr(item, "fixturenames", ()) else file


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
