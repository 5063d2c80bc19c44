"""One engine with a small random model on two ranks, for all tests that only use it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray import LLM
from support.small_engine import CONFIG, start


@pytest.fixture(scope="package")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


@pytest.fixture(scope="package")
def llm(ray_cluster: None, model_dir: Path) -> Iterator[LLM]:
    with start(model_dir, tensor_parallel_size=2, num_speculative_tokens=4) as llm:
        yield llm
