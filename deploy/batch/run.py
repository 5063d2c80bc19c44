"""Hands rows to the replicas and results to the journal, with a bounded number of rows in flight."""

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.deploy.batch import rows
from eagleray.deploy.batch.journal import Journal
from eagleray.deploy.batch.progress import BatchProgress
from eagleray.deploy.batch.rows import Answer, Line, RowError

SHRINK = 8  # how much smaller a group is for each death that its rows saw
MAX_ALONE = 2  # deaths that a row may cause alone: one may have been chance
MAX_IN_VAIN = 10  # deaths without an answer: more than one row needs to be found, if engines can answer others
LOOK_S = 2.0  # between two looks at how far the rows are
SYNC_S = 1.0  # what a machine that loses power may lose; a job that is killed loses nothing that was written

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Replica(Protocol):
    """An engine behind the server's code."""

    async def answer(self, url: str, body: bytes, number: int) -> Answer:
        """Raises `EngineDeadError` if the engine is gone; the row can be tried again.

        `number` is the line's: what the row draws depends on that, and not on which replica has it, or when.
        """

    async def num_unfinished_tokens(self) -> int:
        """How many tokens its rows have that have not ended."""

    async def restart(self) -> None:
        """Start another engine for one that is gone. Raises `EngineStartError`."""


@dataclass(frozen=True, slots=True)
class Suspect:
    """A row that ran when engines died, and may be why."""

    line: Line
    num_deaths: int = 0
    num_alone: int = 0  # of these, with no other row beside it


class BatchRun:
    """Every replica pulls rows from what is left. One that dies is started anew.

    The rows that it ran are tried again in groups of an eighth of the size, and of those that die again in groups of
    an eighth of that, down to single ones. So the row that is to blame is found after a few deaths, and ends as an
    error; the others have their answers.
    """

    def __init__(self, lines: Iterator[Line], journal: Journal, progress: BatchProgress) -> None:
        """`lines` are those without a result."""
        self._lines = lines
        self._suspects: deque[Suspect] = deque()
        self._journal = journal
        self._progress = progress
        self._num_running = 0
        self._num_in_vain = 0  # deaths since the last answer
        self._blamed: list[tuple[Suspect, str]] = []  # and the rows that they are blamed on, each with the last cause

    async def run(self, replicas: Sequence[Replica], window: int) -> None:
        """Until every line has its result; each replica has at most `window` rows.

        Raises `EngineDeadError` with the last cause when rows are left and no replica, or when engines only die;
        `ValueError` if the input changes, `OSError` if the disk takes no more.
        """
        work = asyncio.create_task(self._answer(replicas, window))
        beside = [asyncio.create_task(self._sync()), asyncio.create_task(self._look(replicas))]
        try:
            await asyncio.wait((work, *beside), return_when=asyncio.FIRST_COMPLETED)
            for task in beside:
                if task.done():
                    task.result()  # a disk that fails: what is answered from now on might be lost
            await work
        finally:
            for task in (work, *beside):
                task.cancel()
            await asyncio.wait((work, *beside))

    async def _answer(self, replicas: Sequence[Replica], window: int) -> None:
        while replicas:
            ends = await _together([self._drive(replica, window) for replica in replicas])
            replicas = [replica for replica, end in zip(replicas, ends, strict=True) if end is None]
            if not self._suspects:
                self._give_up()
                return
        raise EngineDeadError(next(filter(None, ends)))

    async def _drive(self, replica: Replica, window: int) -> str | None:
        """Why the replica is gone for good, or None when no line is left to take."""
        recovers = False  # then suspects come first
        while True:
            if recovers and (group := self._group(window)):
                deaths = await _together([self._try(replica, suspect, len(group) == 1) for suspect in group])
            else:
                deaths = await _together([self._pull(replica) for _ in range(window)])
                if not (self._suspects or any(deaths)):
                    return None
            recovers = True
            death = next(filter(None, deaths), None)
            if death is not None and (end := await self._restart(replica, death)) is not None:
                return end

    def _group(self, window: int) -> list[Suspect]:
        """Suspects to be tried together, of one number of deaths; the fewer, the more deaths they saw."""
        if not self._suspects:
            return []
        num_deaths = self._suspects[0].num_deaths
        size = max(1, window // SHRINK**num_deaths)
        group: list[Suspect] = []
        while self._suspects and self._suspects[0].num_deaths == num_deaths and len(group) < size:
            group.append(self._suspects.popleft())
        return group

    async def _restart(self, replica: Replica, death: str) -> str | None:
        """None with a new engine, or why there is none. Raises `EngineDeadError` if engines keep dying."""
        self._num_in_vain += 1
        if self._num_in_vain >= MAX_IN_VAIN:
            raise EngineDeadError(f"{self._num_in_vain} engines died one after the other, and answered no row: {death}")
        logger.warning("an engine died, another is starting: %s", death)
        try:
            await replica.restart()
        except EngineStartError as error:
            logger.warning("the engine cannot be replaced; its rows go to the others, if there are any: %s", error)
            return f"{death}; then no other could start: {error}"
        return None

    async def _pull(self, replica: Replica) -> str | None:
        """Take lines until there is none left; why the engine died, if it did."""
        for line in self._lines:
            if (death := await self._try(replica, Suspect(line), alone=False)) is not None:
                return death
        return None

    async def _try(self, replica: Replica, row: Suspect, alone: bool) -> str | None:
        """Record a row's result, or make it a suspect and say why the engine died."""
        self._num_running += 1
        try:
            request = rows.parse(row.line)
            answer = await replica.answer(request.url, bytes(request.body), row.line.number)
        except RowError as error:
            self._record(rows.refusal(row.line, error), failed=True)
            await asyncio.sleep(0)  # others have their turn, however many lines are refused
        except EngineDeadError as error:
            self._suspect(Suspect(row.line, row.num_deaths + 1, row.num_alone + alone), str(error))
            return str(error)
        else:
            self._num_in_vain = 0
            self._give_up()
            num_tokens = rows.num_completion_tokens(answer)
            self._record(rows.result(row.line, answer), answer.status != 200, num_tokens)
        finally:
            self._num_running -= 1
        return None

    def _suspect(self, row: Suspect, death: str) -> None:
        """Mark rows to be tried again, or as to blame. Those that saw fewer deaths come first."""
        if row.num_alone == MAX_ALONE:
            self._blamed.append((row, death))
            return
        self._suspects.append(row)
        self._suspects = deque(sorted(self._suspects, key=lambda each: each.num_deaths))

    def _give_up(self) -> None:
        """Rows that are to blame get their results once an engine has answered another row, which shows that engines
        work.
        """
        for row, death in self._blamed:
            logger.warning("line %d is given up, since engines died while they ran it", row.line.number)
            self._record(rows.result(row.line, rows.fatal(row.num_alone, death)), failed=True)
        self._blamed.clear()

    def _record(self, text: bytes, failed: bool, num_tokens: int = 0) -> None:
        self._journal.append(text)
        self._progress.count(failed, num_tokens)

    async def _look(self, replicas: Sequence[Replica]) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            num_tokens = await asyncio.gather(*(replica.num_unfinished_tokens() for replica in replicas))
            self._progress.look(self._num_running, sum(num_tokens))

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
