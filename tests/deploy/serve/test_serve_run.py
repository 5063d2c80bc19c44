"""Ray Serve's own command with the configuration that `ray-service.yaml` gives it."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml

from support.processes import children_named
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

MANIFESTS_FOLDER = Path(__file__).parents[3] / "deploy" / "manifests"
SERVE = Path(sys.executable).parent / "serve"
PATIENCE_S = 90.0
SMALL = {"device": "cpu", "tensor_parallel_size": 1, "cpus_per_rank": 0.1, "kv_cache_bytes": 4_000_000}


def service() -> dict[str, Any]:
    """What KubeRay hands to Serve."""
    manifest = yaml.safe_load((MANIFESTS_FOLDER / "ray-service.yaml").read_text())
    config: dict[str, Any] = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return config


def command(*words: str) -> list[str]:
    return [str(SERVE), "run", "--address", ray.get_runtime_context().gcs_address, *words]


@contextmanager
def serve_run(file: Path, log: Path) -> "Iterator[subprocess.Popen[bytes]]":
    """`serve run`, told to end as by Ctrl-C. It ends Ray Serve, too."""
    with log.open("w") as out:
        process = subprocess.Popen(command(str(file)), stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(PATIENCE_S)


def wait_for(what: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not what():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
    except httpx.TransportError:
        return False  # nothing listens yet


def rank_pids() -> set[int]:
    return {process.pid for process in children_named("RankActor")}


def test_serve_run_answers_as_the_service_is_configured_and_adds_a_replica_without_a_restart(
    tmp_path: Path, empty_serve_url: str
) -> None:
    """On the Serve that runs, which it ends: the last test of it."""
    url = empty_serve_url
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "keys").write_text("sk-one\n")
    config = service() | {"http_options": {"host": "127.0.0.1", "port": int(url.rpartition(":")[2])}}
    application = config["applications"][0]
    application["args"] |= SMALL | {"model": str(model), "api_keys_file": str(tmp_path / "keys")}
    file, log = tmp_path / "service.yaml", tmp_path / "log"
    file.write_text(yaml.safe_dump(config))
    with serve_run(file, log) as process:
        wait_for(lambda: healthy(url), process, log)
        asked = {"model": "llama-3.1-8b", "prompt": "a", "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{url}/v1/completions", json=asked, timeout=PATIENCE_S).status_code == 401
        key = {"authorization": "Bearer sk-one"}
        answer = httpx.post(f"{url}/v1/completions", json=asked, headers=key, timeout=PATIENCE_S)
        assert (answer.status_code, answer.json()["usage"]["completion_tokens"]) == (200, 3)
        (first,) = rank_pids()
        application["deployments"][0]["num_replicas"] = 2
        file.write_text(yaml.safe_dump(config))
        subprocess.run(command("--non-blocking", str(file)), check=True, capture_output=True, timeout=PATIENCE_S)
        wait_for(lambda: len(rank_pids()) == 2, process, log)
        assert first in rank_pids()
