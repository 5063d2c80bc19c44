"""`eagleray batch` with real engines on a Ray cluster: killed again and again, with bad rows, and as a Ray job."""

import random
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from support.batch_files import BAD, NUM_ROWS, read_results, texts
from support.batch_jobs import Batch, Whole
from support.cluster_process import Cluster
from support.free_port import free_port
from support.processes import command_line

pytestmark = pytest.mark.engine

SUBMIT = Path(__file__).parents[3] / "deploy" / "manifests" / "submit.sh"


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


def test_rows_that_are_wrong_fail_alone_with_status_and_cause(whole: Whole) -> None:
    assert f"{NUM_ROWS + len(BAD)} rows · {len(BAD)} failed" in whole.said, whole.said
    results = {result["id"]: result for result in whole.results}
    assert len(results) == NUM_ROWS + len(BAD)
    for number, (_, custom_id, failure) in enumerate(BAD, 2):
        result = results[f"batch_req_{number}"]
        response = result["response"]
        error = response["body"]["error"]
        assert result["custom_id"] == custom_id
        assert response["status_code"] == (404 if failure == "model_not_found" else 400)
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["code"], error["type"]) == (failure, "invalid_request_error")
        assert (result["error"] is None) == (failure in (None, "model_not_found", "context_length_exceeded"))
    assert texts([results["batch_req_1"], results[f"batch_req_{len(BAD) + 2}"]]).keys() == {"row 0", "row 1"}


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
    assert cluster.dashboard is not None
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
