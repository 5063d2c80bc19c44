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
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # or each of hundreds of processes compiles the package anew
set_token()  # before anything imports Ray, which would write one into the home of whoever runs this


# Tests of engines that share what is started for them: each list runs on one worker, from its first place to its last.
SHARING = {
    "cluster": ["cluster/runtime", "deploy/openai", "deploy/bench", "deploy/profile", "test_demo_model_against"],
    "batch": ["deploy/batch"],
    "serve": [
        f"deploy/serve/test_{it}.py" for it in ("many_streams", "serve", "serve_demo", "serve_replicas", "serve_run")
    ],
    "commands": ["deploy/cli"],
}
HERE = Path(__file__).parent


def pytest_configure(config: pytest.Config) -> None:
    """Groups of tests are handed out in the order of `pytest_collection_modifyitems`, and not by their numbers."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start engines come first, by what they share or else by file; then the rest, a file at a time.

    They take long: at the end, one worker would wait for the other.
    """
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("engine")
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    items.sort(key=lambda item: item.get_closest_marker("engine") is None)


def group_of(item: pytest.Item) -> str:
    file = item.path.relative_to(HERE).as_posix()
    sharing = [name for name, places in SHARING.items() if any(file.startswith(place) for place in places)]
    return sharing[0] if sharing and item.get_closest_marker("engine") else file


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
