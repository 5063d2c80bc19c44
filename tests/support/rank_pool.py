"""Tensor-parallel ranks as processes that stay, since importing torch takes them seconds."""

import os
import pickle
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import Any

RunRanks = Callable[..., list[Any]]


@contextmanager
def rank_pool(script: Path, num_ranks: int, folder: Path) -> Iterator[RunRanks]:
    """`run(task, size, **arguments)` runs a task of `script` on `size` ranks, and returns each rank's result.

    There are at most `num_ranks`, each started when it is needed first.
    """
    key = secrets.token_hex(16)
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]  # for `support`
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RANKS_KEY": key, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with Listener(str(folder / "socket"), authkey=key.encode()) as listener:
        command = [sys.executable, str(script), str(listener.address)]
        processes: list[subprocess.Popen[bytes]] = []
        ranks: dict[int, Connection] = {}
        stores = (str(folder / f"store{number}") for number in count())

        def start(size: int) -> None:
            assert size <= num_ranks
            missing = range(len(processes), size)
            processes.extend(subprocess.Popen([*command, str(rank)], env=env) for rank in missing)
            for _ in missing:
                connection = listener.accept()
                ranks[connection.recv()] = connection

        def run(task: str, size: int, **arguments: Any) -> list[Any]:
            start(size)
            request = (task, size, next(stores), arguments)
            for rank in range(size):
                ranks[rank].send(request)
            failures, results = list[str](), dict[int, Any]()
            pending = {ranks[rank]: rank for rank in range(size)}
            while pending:
                for connection in wait(list(pending)):
                    assert isinstance(connection, Connection)
                    rank = pending.pop(connection)
                    well, results[rank] = _answer(connection)
                    if not well:
                        failures.append(f"rank {rank} of {size}: {results[rank]}")
            assert not failures, failures[0]  # the others may only have waited for this one
            return [results[rank] for rank in range(size)]

        try:
            yield run
        finally:
            for connection in ranks.values():
                with suppress(OSError):
                    connection.send(None)
            for process in processes:
                _end(process)


def _answer(connection: Connection) -> tuple[bool, Any]:
    try:
        return pickle.loads(connection.recv_bytes())  # type: ignore[no-any-return]
    except EOFError:
        return False, "the process has ended"


def _end(process: "subprocess.Popen[bytes]") -> None:
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
