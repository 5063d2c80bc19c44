"""Fixtures of the tests that need CUDA."""

from collections.abc import Callable
from pathlib import Path

import pytest

from eagleray.deploy.demo_model import DemoModelError, demo_model


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
