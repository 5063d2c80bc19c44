"""Fixtures of the tests that need CUDA."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eagleray.models.loading.demo_model import DemoModelError, demo_model
from support.rank_pool import RunRanks, rank_pool


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model; machines with GPUs often have no way to fetch it."""
    try:
        return demo_model()
    except DemoModelError as error:
        pytest.skip(str(error))


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a figure past pytest's capturing: a margin that shrinks is worth seeing before a test fails."""

    def print_now(text: str) -> None:
        with capsys.disabled():
            print(f"\n    {text}", end="", flush=True)

    return print_now


@pytest.fixture(scope="session")
def run_gpu_ranks(tmp_path_factory: pytest.TempPathFactory) -> RunRanks:
    """Runs the tasks of `support/gpu_rank_process.py`, one rank on each GPU.

    In new processes each time: torch shares memory within a group under the group's name, and never forgets it.
    """
    script = Path(__file__).parents[1] / "support" / "gpu_rank_process.py"

    def run(task: str, size: int, **arguments: Any) -> list[Any]:
        with rank_pool(script, size, tmp_path_factory.mktemp("ranks")) as run_in_pool:
            return run_in_pool(task, size, **arguments)

    return run
