"""`eagleray serve` as a process: it answers, and drains when it is told to end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from eagleray.deploy.serve.environment import FASTER_STREAMS, HAPROXY
from support.cluster_process import Cluster, running_cluster
from support.free_port import free_port
from support.processes import command_line
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

SERVE = [sys.executable, "-m", "eagleray", "serve"]
ENVIRONMENT = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1"}
DRAIN_S = 60.0
END_S = 30.0
OPTIONS = [
    *["--tp", "2", "--threads-per-rank", "1", "--cpus-per-rank", "0.1", "--device", "cpu"],
    *["--kv-cache-bytes", "2000000", "--served-model-name", "tiny", "--drain-timeout-s", str(DRAIN_S)],
]
PATIENCE_S = 150.0


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """One of others, for the tests that need no Ray of the command's own."""
    with running_cluster() as cluster:
        yield cluster


@contextmanager
def serving(
    model_dir: Path, *words: str, environment: dict[str, str] = ENVIRONMENT
) -> "Iterator[subprocess.Popen[str]]":
    command = [*SERVE, str(model_dir), *OPTIONS, "--port", str(free_port()), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE_S)


def address(process: "subprocess.Popen[str]") -> str:
    """What the command prints once the model answers."""
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"tiny answers at (http://127\.0\.0\.1:\d+)/v1\n", line)
    assert found, line + (process.stderr.read() if process.stderr and process.poll() is not None else "")
    return found[1]


def start_parts(process: "subprocess.Popen[str]") -> tuple[float, dict[str, float], dict[str, float]]:
    """Seconds in all, by part, and by part of the engine's, as the command says them once the model answers."""
    assert process.stderr is not None
    line = next(line for line in process.stderr if "ready in" in line)
    found = re.search(r"ready in ([\d.]+) s: (.*) \((.*)\)(.*)", line)
    assert found, line
    return float(found[1]), seconds_of(found[2] + found[4]), seconds_of(found[3])


def seconds_of(text: str) -> dict[str, float]:
    pairs = (part.rsplit(" ", 1) for part in text.strip().split(", "))
    return {part: float(seconds) for part, seconds in pairs}


def is_rank(process: psutil.Process) -> bool:
    return "RankActor" in command_line(process)


def test_sigterm_lets_a_stream_end_whole_and_then_ends_everything(model_dir: Path) -> None:
    asked = {"prompt": "a", "max_tokens": 800, "ignore_eos": True, "stream": True}
    begin = time.monotonic()
    with serving(model_dir) as process:
        url = address(process)
        passed = time.monotonic() - begin
        total, parts, of_engine = start_parts(process)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [each for each in family if is_rank(each)]
        until_ranks = max(rank.create_time() for rank in ranks) - min(each.create_time() for each in family)
        assert until_ranks - 0.1 < total < passed + 0.1  # which is rounded; a rank is not ready when it begins
        assert list(parts) == ["imports", "Ray", "Serve", "replica process", "engine", "first answer"]
        assert sum(parts.values()) == pytest.approx(total, abs=0.05 * (len(parts) + 1))  # all are rounded
        assert "weights" in of_engine
        assert sum(of_engine.values()) == pytest.approx(parts["engine"], abs=0.05 * (len(of_engine) + 1))
        environments = [rank.environ() for rank in ranks]
        assert all(environment.items() >= (FASTER_STREAMS | HAPROXY).items() for environment in environments)
        assert len(environments) == 2
        with httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=PATIENCE_S) as stream:
            lines = (line.removeprefix("data: ") for line in stream.iter_lines() if line)
            events = [next(lines) for _ in range(3)]
            process.send_signal(signal.SIGTERM)
            events += lines
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        assert process.wait(timeout=PATIENCE_S) == 0
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_interrupting_the_start_leaves_no_process(model_dir: Path) -> None:
    with serving(model_dir) as process:
        parent = psutil.Process(process.pid)
        deadline = time.monotonic() + PATIENCE_S
        while not any(is_rank(each) for each in parent.children(recursive=True)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = parent.children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=DRAIN_S + END_S) == 130
    assert psutil.wait_procs(family, timeout=20)[1] == []


def test_interrupting_the_start_on_a_cluster_of_others_takes_all_back_that_it_brought(
    cluster: Cluster, model_dir: Path
) -> None:
    with serving(model_dir, environment=cluster.environment) as process:
        ray = psutil.Process(cluster.pid)
        before = brought(ray)
        deadline = time.monotonic() + PATIENCE_S
        while not any(is_rank(each) for each in ray.children(recursive=True)):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, complained = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130
        lines = [line for line in complained.splitlines() if not line.startswith("eagleray: starting ")]
        assert lines == ["eagleray: ended before the model was ready"]
        left = psutil.wait_procs(brought(ray) - before, timeout=PATIENCE_S)[1]
        assert left == []


@pytest.mark.parametrize(
    ("when", "came_to"),
    [("imports", ["imports"]), ("Ray", ["imports", "Ray"]), ("Serve", ["imports", "Ray", "Serve"])],
)
def test_an_order_to_end_that_comes_early_is_heeded_at_once_and_leaves_nothing_on_a_cluster_of_others(
    cluster: Cluster, when: str, came_to: list[str]
) -> None:
    """What has begun is waited for, so that it can be ended; what has not does not begin."""
    words = [sys.executable, "-m", "support.told_to_end", when]
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # for `support`
    environment = cluster.environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout.splitlines()[-1])
    assert about == {"code": 0, "came_to": came_to, "in_time": True, "joined": False, "left": []}, done.stderr


def brought(ray: psutil.Process) -> set[psutil.Process]:
    """Actors of Serve and of engines."""
    names = ("ray::Serve", "ray::Proxy", "ray::HAProxy", "ray::Core", "ray::Rank", "haproxy")
    return {each for each in ray.children(recursive=True) if any(name in command_line(each) for name in names)}


def test_a_start_that_fails_says_why(model_dir: Path) -> None:
    with serving(model_dir, "--kv-cache-bytes", "10") as process:
        said, complained = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert said == ""
    assert re.search(r"^eagleray: the KV cache holds 0 tokens .* raise kv_cache_bytes", complained, re.MULTILINE), (
        complained
    )
    others = [line for line in complained.splitlines() if not re.fullmatch(r"eagleray: starting .* \d+ s", line)]
    assert len(others) == 1
