"""`eagleray batch` with engines that die: of a killed rank, and of a row that no engine survives."""

import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from support.batch_files import read_results, row, texts, write_rows
from support.batch_jobs import Batch
from support.cluster_process import Cluster
from support.processes import command_line

pytestmark = pytest.mark.engine

DEADLY_TOKEN = 4242  # as there; a prompt that is text has it only by chance

NUM_ROWS = 40


def first_of(expected: dict[str, str]) -> dict[str, str]:
    """Those of the rows here."""
    return {f"row {index}": expected[f"row {index}"] for index in range(NUM_ROWS)}


def rows() -> list[dict[str, Any]]:
    """They are greedy as the model would have it: else no two runs would be equal."""
    return [row(index, temperature=None) for index in range(NUM_ROWS)]


@pytest.mark.parametrize(
    ("num_replicas", "size"),
    [pytest.param(1, 2, marks=pytest.mark.soak), (2, 1), pytest.param(2, 2, marks=pytest.mark.soak)],
)
def test_a_killed_rank_costs_no_row(
    tmp_path: Path, cluster: Cluster, model: Path, expected: dict[str, str], num_replicas: int, size: int
) -> None:
    write_rows(tmp_path / "in.jsonl", rows())
    options = ("--replicas", str(num_replicas), "--tensor-parallel-size", str(size))
    batch = Batch(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), model, cluster.environment, options)
    killed: list[int] = []

    def kill_a_rank() -> bool:
        if batch.num_written and not killed:
            ranks = [each for each in psutil.Process(cluster.pid).children(recursive=True) if is_rank(each)]
            assert len(ranks) == num_replicas * size
            killed.append(ranks[0].pid)
            ranks[0].send_signal(signal.SIGKILL)
        return False

    assert not batch.kill_once(kill_a_rank)
    assert killed
    assert texts(read_results(tmp_path / "out.jsonl")) == first_of(expected)


def is_rank(process: psutil.Process) -> bool:
    return "ray::RankActor" in command_line(process)


def test_a_row_that_kills_every_engine_fails_alone_with_the_cause(
    tmp_path: Path, cluster: Cluster, model: Path, expected: dict[str, str]
) -> None:
    body = {"prompt": [1, DEADLY_TOKEN, 2], "max_tokens": 2}
    deadly = {"custom_id": "deadly", "method": "POST", "url": "/v1/completions", "body": body}
    write_rows(tmp_path / "in.jsonl", [*rows()[:20], deadly, *rows()[20:]])
    batch = Batch(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), model, cluster.environment)
    code, err = batch.run()
    assert (code, f"{NUM_ROWS + 1} rows · 1 failed" in err) == (0, True), err
    assert err.count("an engine died, another is starting") == 3, err  # beside others, and twice alone
    assert "sampling defaults of the model's generation_config.json: temperature 0" in err
    results = read_results(tmp_path / "out.jsonl")
    (failed,) = [result for result in results if result["custom_id"] == "deadly"]
    assert (failed["id"], failed["response"]["status_code"]) == ("batch_req_21", 500)
    error = failed["response"]["body"]["error"]
    assert error["code"] == "engine_died"
    assert "rank 0" in error["message"]
    assert texts([result for result in results if result is not failed]) == first_of(expected)
