"""SIGTERM and Ctrl-C while Ray starts, while ranks start, and while they run: a quiet end, and nothing is left.

`tests/bench/signals_at_random.py` tries any moment.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.strikes import own_places, processes_in, title
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

SCRIPT = """
import sys
from eagleray import LLM, SamplingParams
with LLM(sys.argv[1], 2, threads_per_rank=1, kv_cache_bytes=16_000_000) as llm:
    llm.generate([[1, 2]], SamplingParams(max_tokens=4000, ignore_eos=True), use_tqdm=False)
"""
OPTIONS = (
    *("--tp", "2", "--threads-per-rank", "1", "--kv-cache-bytes", "16000000"),
    *("--max-tokens", "4000", "--ignore-eos", "--raw"),
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def generate(model_dir: Path) -> list[str]:
    return [
        sys.executable,
        "-m",
        "eagleray",
        "generate",
        "--model",
        str(model_dir),
        *OPTIONS,
        *"abcdefgh",
    ]


def script(model_dir: Path) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(model_dir)]


@pytest.mark.parametrize(
    ("command", "phase", "blow"),
    [
        pytest.param(generate, "gcs_server", signal.SIGTERM, marks=pytest.mark.soak),
        (generate, "raylet/raylet", signal.SIGINT),
        pytest.param(generate, "RankActor.prepare", signal.SIGTERM, marks=pytest.mark.soak),
        pytest.param(generate, "RankActor.serve", signal.SIGINT, marks=pytest.mark.soak),
        (generate, "RankActor.serve", signal.SIGTERM),
        (script, "RankActor.prepare", signal.SIGTERM),
    ],
)
def test_a_signal_ends_everything_quietly(
    model_dir: Path, command: Callable[[Path], list[str]], phase: str, blow: signal.Signals
) -> None:
    with own_places() as (environment, folder):
        log = folder / "log"
        with log.open("w") as out:
            process = subprocess.Popen(
                command(model_dir), env=environment, stdout=out, stderr=out, start_new_session=True
            )
        while not any(phase in title(each) for each in processes_in(folder)):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        if blow == signal.SIGINT:
            os.killpg(process.pid, blow)  # as a terminal does
        else:
            process.send_signal(blow)
        assert process.wait(60) == (130 if blow == signal.SIGINT else 143), log.read_text()
        _, alive = psutil.wait_procs(processes_in(folder), timeout=20)
        left = [title(each) for each in alive]
        for each in alive:
            each.kill()
        assert not left
        assert not list(Path(environment["TMPDIR"]).glob("eagleray-*"))
        said = [line for line in log.read_text().splitlines() if not line.startswith("eagleray: ")]
        assert len(said) <= 1, log.read_text()  # the figures of what ran
