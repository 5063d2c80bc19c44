"""Rows to the engines and results to the journal, with so many rows in flight and no more."""

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from typing import Protocol, TypeVar

from eagleray.cluster.errors import EngineDeadError
from eagleray.deploy import batch_rows
from eagleray.deploy.batch_journal import Journal
from eagleray.deploy.batch_progress import BatchProgress
from eagleray.deploy.batch_rows import Answer, Line, RowError

SYNC_S = 1.0  # what a machine that loses power may lose; a job that is killed loses nothing that was written

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Replica(Protocol):
    """An engine behind the server's code."""

    async def answer(self, url: str, body: bytes) -> Answer:
        """Raises `EngineDeadError` if the engine is gone; the row can go to another one."""


class BatchRun:
    """Every replica pulls rows from what is left. A replica that dies gives its rows back to the others."""

    def __init__(self, lines: Iterator[Line], journal: Journal, progress: BatchProgress) -> None:
        """`lines` are those without a result."""
        self._lines = lines
        self._given_back: deque[Line] = deque()
        self._journal = journal
        self._progress = progress

    async def run(self, replicas: Sequence[Replica], window: int) -> None:
        """Until every line has its result; each replica has at most `window` rows.

        Raises `EngineDeadError` with the last cause when rows are left and no replica, `ValueError` if the input
        changes, `OSError` if the disk takes no more.
        """
        syncing = asyncio.create_task(self._sync())
        try:
            while replicas:
                deaths = await _together([self._drive(replica, window) for replica in replicas])
                replicas = [replica for replica, death in zip(replicas, deaths, strict=True) if death is None]
                if syncing.done():
                    syncing.result()  # a disk that fails
                if not self._given_back:
                    return
        finally:
            syncing.cancel()
        raise EngineDeadError(next(filter(None, deaths)))

    async def _drive(self, replica: Replica, window: int) -> str | None:
        """Why the replica died, or None once there is no line left to take."""
        deaths = await _together([self._pull(replica) for _ in range(window)])
        if (death := next(filter(None, deaths), None)) is not None:
            logger.warning("an engine is gone, and its rows go to others if there are any: %s", death)
        return death

    async def _pull(self, replica: Replica) -> str | None:
        while (line := self._next()) is not None:
            try:
                row = batch_rows.parse(line)
                answer = await replica.answer(row.url, bytes(row.body))
            except RowError as error:
                self._record(batch_rows.refusal(line, error), failed=True)
                await asyncio.sleep(0)  # others have their turn, however many lines are refused
            except EngineDeadError as error:
                self._given_back.append(line)
                return str(error)
            else:
                num_tokens = batch_rows.num_completion_tokens(answer)
                self._record(batch_rows.result(line, answer), answer.status != 200, num_tokens)
        return None

    def _next(self) -> Line | None:
        return self._given_back.popleft() if self._given_back else next(self._lines, None)

    def _record(self, text: bytes, failed: bool, num_tokens: int = 0) -> None:
        self._journal.append(text)
        self._progress.count(failed, num_tokens)

    async def _sync(self) -> None:
        while True:
            await asyncio.sleep(SYNC_S)
            await asyncio.to_thread(self._journal.sync)


async def _together(work: Sequence[Coroutine[None, None, T]]) -> list[T]:
    """What each returns; the first that raises ends the others."""
    tasks = [asyncio.create_task(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
