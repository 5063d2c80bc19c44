"""Shows answers live on a terminal, and whole, in the order of the prompts, everywhere else."""

from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from eagleray.deploy.cli.answers import Answer, InOrder
from eagleray.deploy.cli.render import ASIDE, tail, whole

REFRESHES_PER_SECOND = 12


class View(Protocol):
    """Entered before the first update; left after the last one, or, on an interruption, with what there is."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def news(self, answer: Answer) -> None:
        """Show that there is more of this answer."""

    def done(self, answer: Answer) -> None:
        """Show that there will be no more of it."""


class Bar:
    """The progress bar: requests done, tokens a second, time."""

    def __init__(self, console: Console, num_requests: int) -> None:
        self.progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("requests · {task.fields[tokens]} tokens · {task.fields[rate]:.1f} tokens/s ·"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            redirect_stdout=False,  # standard output may be a file, where answers belong
        )
        self._id = self.progress.add_task("", start=False, total=num_requests, tokens=0, rate=0.0)
        self._num_tokens: dict[int, int] = {}
        self._total = 0

    def start(self) -> None:
        """Let the clock run."""
        self.progress.start_task(self._id)

    def count(self, answer: Answer, done: bool = False) -> None:
        """Take in news of one answer."""
        self._total += answer.num_tokens - self._num_tokens.get(answer.index, 0)
        self._num_tokens[answer.index] = answer.num_tokens
        elapsed = self.progress.tasks[self._id].elapsed or 0.0
        rate = self._total / elapsed if elapsed > 0 else 0.0
        self.progress.update(self._id, advance=int(done), tokens=self._total, rate=rate)


class PlainView:
    """Each answer whole, as soon as it and those before it are done; a bar on standard error if that is a terminal."""

    def __init__(self, write: Callable[[Answer], None], err: Console, num_requests: int) -> None:
        self._bar = Bar(err, num_requests)
        self._order = InOrder(write)

    def __enter__(self) -> Self:
        self._bar.start()
        self._bar.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.progress.stop()
        self._order.flush()

    def news(self, answer: Answer) -> None:
        self._bar.count(answer)

    def done(self, answer: Answer) -> None:
        self._bar.count(answer, done=True)
        self._order.done(answer)


class TerminalView:
    """Answers stream at the bottom, each by its last lines; finished ones move up, whole and in order."""

    def __init__(self, console: Console, num_requests: int) -> None:
        self._console = console
        self._bar = Bar(console, num_requests)
        self._order = InOrder(self._print)
        self._open: dict[int, Answer] = {}
        self._live = Live(
            get_renderable=self.render, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )

    def __enter__(self) -> Self:
        self._bar.start()
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        for index in sorted(self._open):
            self._print(self._open[index])

    def news(self, answer: Answer) -> None:
        self._open[answer.index] = answer
        self._bar.count(answer)

    def done(self, answer: Answer) -> None:
        self._open[answer.index] = answer
        self._bar.count(answer, done=True)
        self._order.done(answer)

    def _print(self, answer: Answer) -> None:
        del self._open[answer.index]
        self.refresh()  # what is printed appears above the region as last drawn
        self._console.print(whole(answer), "", sep="\n")

    def refresh(self) -> None:
        """Draw the region now; otherwise it is drawn several times a second."""
        self._live.refresh()

    def render(self) -> RenderableType:
        """The region. Called from the thread that refreshes, so it looks at a copy."""
        answers = [answer for _, answer in sorted(self._open.copy().items())]
        room = self._console.height - 3  # the bar, and a line above and below it
        shown = answers[: max(room // 3, 1)]
        rows = max(room // max(len(shown), 1) - 2, 1)  # of each, less its title and the line after it
        blocks: list[RenderableType] = [tail(answer, self._console, rows) for answer in shown]
        if len(shown) < len(answers):
            blocks.append(Text(f"… and {len(answers) - len(shown)} more", style=ASIDE))
        return Group(*blocks, self._bar.progress.get_renderable())
