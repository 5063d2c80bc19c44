"""Which Ray cluster is joined, and what is said when there is none to be had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.cluster.runtime.ray_address import IN_A_JOB, answers, cluster_address
from support.cluster_process import running_cluster
from support.free_port import free_port
from support.small_engine import CONFIG

pytestmark = pytest.mark.engine

FORGETS = """
import sys, weakref
class Anything: ...
anything = Anything()
weakref.finalize(anything, print)  # the first of the process: where it became known all of them run
from support.small_engine import start
llm = start(sys.argv[1])
"""
CONNECT = """
from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineStartError
from eagleray.cluster.runtime.placement import connect
try:
    connect(EngineConfig(model="x"))
except (EngineStartError, ValueError) as error:
    print(error)
"""


def refusal(**environment: str) -> str:
    """What a program is told that wants an engine in this environment."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    run = subprocess.run(
        [sys.executable, "-c", CONNECT], env=clean | environment, capture_output=True, text=True, timeout=60, check=True
    )
    return run.stdout.strip()


def test_a_cluster_that_is_gone_is_named_at_once() -> None:
    address = f"127.0.0.1:{free_port()}"
    message = refusal(RAY_ADDRESS=address)
    assert message.startswith(f"nothing answers at {address}, the address of the Ray cluster named by RAY_ADDRESS; ")


def test_whatever_ray_raises_is_told_with_a_remedy() -> None:
    message = refusal(RAY_ADDRESS="nonsense")
    assert message.startswith("the Ray cluster at nonsense (named by RAY_ADDRESS) cannot be joined (ValueError: ")
    assert message.endswith("; start it, or unset RAY_ADDRESS")
    message = refusal(RAY_ADDRESS="local", RAY_TMPDIR="/proc/nowhere")
    assert message.startswith("Ray did not start on this machine (FileNotFoundError: ")
    assert "ray start --head" in message


def test_a_cluster_of_ray_start_that_asks_for_a_token_is_joined_with_it_or_says_what_is_wrong(tmp_path: Path) -> None:
    with running_cluster() as cluster:
        (tmp_path / "ray").symlink_to(cluster.environment["RAY_TMPDIR"])
        home = {"HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
        address = cluster.environment["RAY_ADDRESS"]
        file = tmp_path / "ray" / "ray_current_cluster"
        asks = f"the Ray cluster at {address} (made by `ray start`, which wrote {file}) asks for a token"
        assert refusal(**home).startswith(f"{asks}, and there is none in RAY_AUTH_TOKEN, ")
        assert refusal(**home, RAY_AUTH_TOKEN="0" * 64).startswith(f"{asks}, and it is not the one in RAY_AUTH_TOKEN, ")
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(cluster.environment["RAY_AUTH_TOKEN"])
        assert refusal(**home, RAY_AUTH_MODE="disabled").startswith(f"{asks}, but RAY_AUTH_MODE is 'disabled'; ")
        assert refusal(**home) == ""
        assert refusal(**home, RAY_ADDRESS=address) == ""


def test_sockets_of_ray_have_a_short_place_or_the_remedy_is_said_at_once(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * (87 - len(str(tmp_path))) if len(str(tmp_path)) < 87 else "d")
    deep.mkdir()
    message = refusal(RAY_ADDRESS="local", RAY_TMPDIR=str(deep))
    assert message.startswith(f"RAY_TMPDIR is {deep}, too long for Ray's sockets; set one of at most ")
    assert refusal(RAY_ADDRESS="local", TMPDIR=str(deep)) == ""


def test_a_cluster_that_ray_start_left_behind_is_taken_only_if_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv(IN_A_JOB, raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert cluster_address() is None
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}\n")
    assert cluster_address() is None
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert cluster_address() == "10.0.0.1:6379"
    monkeypatch.setenv(IN_A_JOB, "{}")
    assert cluster_address() == "10.0.0.1:6379", "no raylet has started this process"


@pytest.mark.parametrize("address", ["auto", "local", "ray://10.0.0.1:10001", "head"])
def test_addresses_of_other_forms_are_left_to_ray(address: str) -> None:
    assert answers(address)


def test_a_program_that_forgets_to_close_ends_its_engine_without_a_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with running_cluster() as cluster:
        search_path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        run = subprocess.run(
            [sys.executable, "-c", FORGETS, tmp_path],
            env=cluster.environment | search_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        assert "Error" not in run.stderr
