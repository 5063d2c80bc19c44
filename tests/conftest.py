"""Fixtures that every room's tests may use."""

import logging
import os
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
set_token()  # before anything imports Ray, which would write one into the home of whoever runs this


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start engines run one after the other, and first; on another core the rest, a file at a time."""
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
        group = "engines" if item.get_closest_marker("engine") else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model, SmolLM2-135M-Instruct in float32, converted on first use."""
    return demo_model()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster whose logical CPUs suffice for three ranks on any machine."""
    import ray

    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  or whatever else runs here slows the ranks
    set_environment()  # Ray Serve as `eagleray serve` has it
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
