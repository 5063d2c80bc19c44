"""The progress of a batch: a bar on a terminal, a line in the log now and then everywhere else."""

import logging
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from eagleray.cluster.errors import counted

LOG_EVERY_S = 30.0  # counted from the first row on

logger = logging.getLogger(__name__)


class BatchProgress:
    """Counts rows; rates are of this run, and leave out what an earlier one did."""

    def __init__(self, console: Console, num_rows: int, num_done: int, num_failed: int) -> None:
        self.num_rows, self.num_done, self.num_failed = num_rows, num_done, num_failed
        self.num_before = num_done
        self.num_tokens = 0
        self._tokens_logged = 0
        self._started = self._logged = time.monotonic()
        self._bar = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("· {task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task(self._figures(), start=False, total=num_rows, completed=num_done, left="")

    def begin(self) -> None:
        """Let the clock run from now on."""
        self._bar.start_task(self._task)
        self._started = self._logged = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self._started

    def count(self, failed: bool, num_tokens: int) -> None:
        """One more row has its result."""
        self.num_done += 1
        self.num_failed += failed
        self.num_tokens += num_tokens
        self._bar.update(self._task, completed=self.num_done, description=self._figures(), left=self._left())

    def look(self, num_running: int, num_tokens: int) -> None:
        """Show how many rows run, and their tokens. Where there is no bar, the log says so now and then."""
        self._bar.update(self._task, description=self._figures())
        now, tokens = time.monotonic(), self.num_tokens + num_tokens
        if self._bar.disable and (seconds := now - self._logged) >= LOG_EVERY_S:
            parts = [f"{self.num_done} of {self.num_rows} rows", f"{num_running} running"]
            parts += [f"{self.num_failed} failed"] if self.num_failed else []
            parts += [f"{max(tokens - self._tokens_logged, 0) / seconds:.1f} tokens/s", self._left()]
            logger.info("%s", " · ".join(filter(None, parts)))
            self._logged, self._tokens_logged = now, tokens

    def line(self) -> str:
        """All figures, at the end."""
        parts = [counted(self.num_done, "row"), f"{self.num_failed} failed"]
        if self.num_before:
            parts.append(f"{self.num_before} done before")
        parts.append(f"{counted(self.num_tokens, 'output token')} in {self.elapsed:.1f} s")
        return " · ".join([*parts, self._rates()])

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def _figures(self) -> str:
        failed = f"{self.num_failed} failed · " if self.num_failed else ""
        return f"rows · {failed}{self._rates()} ·"

    def _rates(self) -> str:
        seconds = max(self.elapsed, 1e-9)
        return f"{(self.num_done - self.num_before) / seconds:.1f} rows/s · {self.num_tokens / seconds:.1f} tokens/s"

    def _left(self) -> str:
        done = self.num_done - self.num_before
        if not done:
            return ""
        seconds = round((self.num_rows - self.num_done) * self.elapsed / done)
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"
