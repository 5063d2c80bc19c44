"""What newcomers do first: the first example of the README, and a model of the Hugging Face hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.cluster_process import running_cluster
from support.hub_server import Repository, files_of, hub_server
from support.tiny_model import write_tiny_model

pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[3]
EAGLERAY = [sys.executable, "-m", "eagleray"]
NAME = "some-body/tiny"


@pytest.mark.usefixtures("demo_model_dir")
def test_the_first_example_of_the_readme_runs_as_it_is(tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    environment = os.environ | {"RAY_ADDRESS": "local", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    program = [sys.executable, "-c", found[1]]
    run = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r" (?:length|stop)$", run.stdout, re.MULTILINE)) == 2
    assert len(run.stdout.splitlines()[-1].split()) > 1  # drawn anew each time, so no word of it is certain


def test_each_node_fetches_the_commit_that_the_driver_has_seen(tmp_path: Path) -> None:
    """The driver's cache and that of the ranks' node are two here, as they are on two machines."""
    checkpoint = write_tiny_model(tmp_path / "checkpoint")
    with hub_server() as hub:
        repository = hub.repositories[NAME] = Repository()
        commit = repository.push(files_of(checkpoint))
        hub.then = lambda: repository.push(files_of(checkpoint) | {"model.safetensors": b"pushed meanwhile"})
        shared = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT / "src")}
        with running_cluster(shared | {"HF_HOME": str(tmp_path / "node")}) as cluster:
            options = ["--tp", "2", "--raw", "--max-tokens", "3", "--ignore-eos", "--json", "--threads-per-rank", "1"]
            run = subprocess.run(
                [*EAGLERAY, "generate", "--model", NAME, *options, "--kv-cache-bytes", "1000000", "hello"],
                env=cluster.environment | {"HF_HOME": str(tmp_path / "driver")},
                capture_output=True,
                text=True,
                timeout=240,
            )
    assert run.returncode == 0, run.stderr
    assert len(json.loads(run.stdout)["outputs"][0]["token_ids"]) == 3
    assert repository.refs["main"] != commit
    snapshots = f"hub/models--{NAME.replace('/', '--')}/snapshots"
    assert files_of(tmp_path / "node" / snapshots) == {f"{commit}/{k}": v for k, v in files_of(checkpoint).items()}
    assert not list((tmp_path / "driver").rglob("*.safetensors"))
    assert hub.asked_for("safetensors") == 1  # by one of the two ranks
