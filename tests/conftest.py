"""Fixtures that every room's tests may use."""

from pathlib import Path

import pytest

from eagleray.deploy.demo_model import demo_model


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model, SmolLM2-135M-Instruct in float32, converted on first use."""
    return demo_model()
