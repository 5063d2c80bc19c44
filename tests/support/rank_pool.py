"""Tensor-parallel ranks as processes that stay, since importing torch takes them seconds."""

import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

RunRanks = Callable[..., list[Any]]


@contextmanager
def rank_pool(script: Path, num_ranks: int, folder: Path) -> Iterator[RunRanks]:
    """`run(task, size, **arguments)` runs a task of `script` on `size` ranks, and returns each rank's result."""
    key = secrets.token_hex(16)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]  # for `support`
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS_KEY": key, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with Listener(str(folder / "socket"), authkey=key.encode()) as listener:
        command = [sys.executable, str(script), str(listener.address)]
        processes = [subprocess.Popen([*command, str(rank)], env=env) for rank in range(num_ranks)]
        ranks: dict[int, Connection] = {}
        while len(ranks) < num_ranks:
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
