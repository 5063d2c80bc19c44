"""A Ray cluster, a model and what it answers, for all tests of `eagleray batch` with real engines."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.batch_files import BAD, NUM_ROWS, read_results, row, texts, write_rows
from support.batch_jobs import Batch, Whole, small_checkpoint
from support.cluster_process import Cluster, running_cluster

DEADLY_FOLDER = Path(__file__).parents[2] / "support" / "deadly"


@pytest.fixture(scope="package")
def cluster() -> Iterator[Cluster]:
    """Its processes know the model that one token kills."""
    path = os.pathsep.join(filter(None, [str(DEADLY_FOLDER), os.environ.get("PYTHONPATH")]))
    with running_cluster({"PYTHONPATH": path}, dashboard=True) as cluster:
        yield cluster


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Path:
    directory = small_checkpoint(tmp_path_factory.mktemp("model"), demo_model_dir)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"architectures": ["DeadlyLlamaForCausalLM"]}))
    (directory / "generation_config.json").write_text('{"temperature": 0.0, "eos_token_id": 2}')
    return directory


@pytest.fixture(scope="package")
def input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("input") / "in.jsonl"
    write_rows(file, (row(index) for index in range(NUM_ROWS)))
    return file


@pytest.fixture(scope="package")
def whole(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, model: Path) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    file, output = folder / "in.jsonl", folder / "out.jsonl"
    write_rows(file, [row(0), *(text for text, _, _ in BAD), *(row(index) for index in range(1, NUM_ROWS))])
    code, err = Batch(str(file), str(output), model, cluster.environment).run()
    assert code == 0, err
    return Whole(err, read_results(output))


@pytest.fixture(scope="package")
def expected(whole: Whole) -> dict[str, str]:
    """Every good row's text in a run that nothing interrupted."""
    good = {"batch_req_1", *(f"batch_req_{len(BAD) + 1 + index}" for index in range(1, NUM_ROWS))}
    answers = texts([result for result in whole.results if result["id"] in good])
    assert len(answers) == NUM_ROWS
    assert len(set(answers.values())) > NUM_ROWS // 2, "the texts would not tell one row from another"
    return answers
