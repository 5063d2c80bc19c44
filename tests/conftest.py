"""Fixtures that every room's tests may use."""

import logging
import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import pytest
import ray

from eagleray.deploy.demo_model import demo_model


@pytest.fixture(scope="session")
def demo_model_dir() -> Path:
    """The demo model, SmolLM2-135M-Instruct in float32, converted on first use."""
    return demo_model()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray cluster whose logical CPUs suffice for three ranks on any machine."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  or whatever else runs here slows the ranks
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


RANK_PROCESS = Path(__file__).parent / "support" / "rank_process.py"
NUM_RANKS = 4


@pytest.fixture(scope="session")
def run_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., list[Any]]]:
    """`run_ranks(task, size, **arguments)` runs a task of `support/rank_process.py` on `size` tensor-parallel ranks.

    Returns each rank's result. The processes are started once, since importing torch takes them seconds.
    """
    folder = tmp_path_factory.mktemp("ranks")
    key = secrets.token_hex(16)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS_KEY": key}
    with Listener(str(folder / "socket"), authkey=key.encode()) as listener:
        command = [sys.executable, str(RANK_PROCESS), str(listener.address)]
        processes = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(NUM_RANKS)]
        ranks: dict[int, Connection] = {}
        while len(ranks) < NUM_RANKS:
            connection = listener.accept()
            ranks[connection.recv()] = connection
        stores = (str(folder / f"store{number}") for number in count())

        def run(task: str, size: int, **arguments: Any) -> list[Any]:
            request = (task, size, next(stores), arguments)
            for rank in range(size):
                ranks[rank].send(request)
            answers = [pickle.loads(ranks[rank].recv_bytes()) for rank in range(size)]
            for rank, (well, result) in enumerate(answers):
                assert well, f"rank {rank} of {size}: {result}"
            return [result for _, result in answers]

        yield run
        for connection in ranks.values():
            connection.send(None)
    for process in processes:
        process.wait(timeout=30)
