"""`eagleray batch` with real engines on a Ray cluster: killed again and again, with bad rows, and as a Ray job."""

import json
import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.batch_files import read_results, row, texts, write_rows
from support.batch_jobs import Batch, small_checkpoint
from support.cluster_process import Cluster, running_cluster
from support.free_port import free_port
from support.processes import command_line

pytestmark = pytest.mark.engine

SUBMIT = Path(__file__).parents[3] / "deploy" / "manifests" / "submit.sh"
NUM_ROWS = 80


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model_dir: Path) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"), demo_model_dir)


@pytest.fixture(scope="module")
def input(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("input") / "in.jsonl"
    write_rows(file, (row(index) for index in range(NUM_ROWS)))
    return file


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster, model: Path, input: Path) -> dict[str, str]:
    """Every row's text in a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("output") / "out.jsonl"
    code, err = Batch(str(input), str(output), model, cluster.environment).run()
    assert code == 0, err
    assert f"{NUM_ROWS} rows · 0 failed" in err
    answers = texts(read_results(output))
    assert len(answers) == NUM_ROWS
    assert len(set(answers.values())) > NUM_ROWS // 2, "the texts would not tell one row from another"
    return answers


@pytest.mark.parametrize("num_kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_a_job_killed_again_and_again_answers_every_row_once(
    tmp_path: Path, cluster: Cluster, model: Path, input: Path, expected: dict[str, str], num_kills: int
) -> None:
    rng = random.Random(0)
    batch = Batch(str(input), str(tmp_path / "out.jsonl"), model, cluster.environment)
    sidecar = tmp_path / "out.jsonl.partial.json"
    assert batch.kill_once(sidecar.exists)
    for _ in range(num_kills):
        enough = batch.num_written + rng.randrange(1, 9_000)
        assert batch.kill_once(lambda enough=enough: batch.num_written >= enough)  # type: ignore[misc]
    assert not (tmp_path / "out.jsonl").exists()
    code, err = batch.run()
    assert code == 0, err
    assert "done before" in err
    assert texts(read_results(tmp_path / "out.jsonl")) == expected
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_rows_that_are_wrong_fail_alone_with_status_and_cause(tmp_path: Path, cluster: Cluster, model: Path) -> None:
    bad = {
        "no JSON": ('{"custom_id": ', None, "invalid_row"),
        "no body": ('{"custom_id": "no body", "method": "POST", "url": "/v1/completions"}', "no body", "invalid_row"),
        "again": (json.dumps(row(1)), "row 1", "duplicate_custom_id"),
        "method": (json.dumps({**row(2), "custom_id": "m", "method": "GET"}), "m", "invalid_method"),
        "url": (json.dumps({**row(2), "custom_id": "u", "url": "/v1/embeddings"}), "u", "invalid_url"),
        "stream": (json.dumps({**row(2, stream=True), "custom_id": "s"}), "s", "invalid_stream"),
        "tools": (json.dumps({**row(2, tools=[{"type": "function"}]), "custom_id": "tools"}), "tools", None),
        "range": (json.dumps({**row(2, temperature=-1), "custom_id": "range"}), "range", None),
        "long": (json.dumps({**row(3, prompt="a " * 3000), "custom_id": "long"}), "long", "context_length_exceeded"),
        "model": (json.dumps({**row(3, model="gpt"), "custom_id": "model"}), "model", "model_not_found"),
    }
    file, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(file, [row(1), *(text for text, _, _ in bad.values()), row(0)])
    code, err = Batch(str(file), str(output), model, cluster.environment).run()
    assert (code, f"12 rows · {len(bad)} failed" in err) == (0, True), err
    results = {result["id"]: result for result in read_results(output)}
    assert len(results) == 12
    for number, (_, custom_id, failure) in enumerate(bad.values(), 2):
        result = results[f"batch_req_{number}"]
        response = result["response"]
        error = response["body"]["error"]
        assert result["custom_id"] == custom_id
        assert response["status_code"] == (404 if failure == "model_not_found" else 400)
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["type"]) == (failure, "invalid_request_error")
        assert (result["error"] is None) == (failure in (None, "model_not_found", "context_length_exceeded"))
    assert texts([results["batch_req_1"], results["batch_req_12"]]).keys() == {"row 0", "row 1"}


def is_replica(process: psutil.Process) -> bool:
    return "ray::ReplicaActor" in command_line(process)


def test_two_replicas_share_the_rows_and_one_may_die(
    tmp_path: Path, cluster: Cluster, model: Path, input: Path, expected: dict[str, str]
) -> None:
    batch = Batch(str(input), str(tmp_path / "out.jsonl"), model, cluster.environment, ("--replicas", "2"))
    killed: list[int] = []

    def kill_a_replica() -> bool:
        if batch.num_written and not killed:
            children = psutil.Process(cluster.pid).children(recursive=True)
            replicas = [process for process in children if is_replica(process)]
            assert len(replicas) == 2
            killed.append(replicas[0].pid)
            replicas[0].send_signal(signal.SIGKILL)
        return False

    assert not batch.kill_once(kill_a_replica)
    assert killed
    assert texts(read_results(tmp_path / "out.jsonl")) == expected


@pytest.fixture
def misled(ray_cluster: None, cluster: Cluster) -> Iterator[None]:
    """Where there are two clusters, Ray believes this file about which one a job belongs to; it may be a dead one."""
    file = Path(cluster.environment["RAY_TMPDIR"], "ray_current_cluster")
    address = file.read_text()
    file.write_text(f"127.0.0.1:{free_port()}")
    yield
    file.write_text(address)


@pytest.mark.usefixtures("misled")
def test_a_submitted_job_runs_to_its_end_with_objects_for_files(
    tmp_path: Path, cluster: Cluster, model: Path, input: Path, expected: dict[str, str]
) -> None:
    """`file://` goes the way of every object store: fetched, kept in the work directory, uploaded."""
    (tmp_path / "work").mkdir()
    places = f"file://{input}", f"file://{tmp_path}/out.jsonl"
    batch = Batch(
        *places,
        model,
        cluster.environment,
        ("--work-dir", str(tmp_path / "work"), "--replicas", "auto", "--cpus-per-rank", "4"),
    )
    options = ["--address", cluster.dashboard, "--submission-id", "my-batch", "--"]
    run = subprocess.run(
        [SUBMIT, *options, *batch.words],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Job 'my-batch' succeeded" in run.stdout
    assert f"{NUM_ROWS} rows · 0 failed" in run.stdout
    assert texts(read_results(tmp_path / "out.jsonl")) == expected
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in.jsonl", "/out.jsonl"], "in.jsonl is neither an absolute path nor a URL"),
        (["--no-wait", "--", "/in"], "INPUT and"),
    ],
)
def test_what_the_cluster_could_not_find_is_not_submitted(words: list[str], message: str) -> None:
    run = subprocess.run([SUBMIT, *words], capture_output=True, text=True, timeout=20, check=False)
    assert (run.returncode, message in run.stderr) == (2, True), run.stderr
