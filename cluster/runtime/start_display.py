"""Shows the progress of a start on one line of a terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import IO

from rich.console import Console
from rich.filesize import pick_unit_and_suffix
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from eagleray.cluster.config import EngineConfig
from eagleray.models.loading.model_dir import public_name
from eagleray.workers.protocol import startup


@contextmanager
def shown_start(config: EngineConfig, console: Console) -> Iterator[startup.OnProgress]:
    """Show that an engine starts, and the progress given to the function that this yields.

    The line is gone once the start is ready or has failed, so that what is written next has a line of its own. On what
    is not a terminal nothing is shown.
    """
    if not console.file.isatty():
        yield startup.unheard
        return
    with ExitStack() as shown:
        file = console.file
        line = shown.enter_context(_line(console))
        shown.enter_context(_logged_above(file))
        name = public_name(config.model)
        _begin(line, name, phase="")
        yield partial(_show, shown, line, name)


def _line(console: Console) -> Progress:
    """What writes to standard error meanwhile appears above it; standard output may be a file, and is left alone."""
    return Progress(
        SpinnerColumn(),
        TextColumn("starting {task.fields[name]}", markup=False),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[size]}"),
        console=console,
        transient=True,
        redirect_stdout=False,
    )


@contextmanager
def _logged_above(file: IO[str]) -> Iterator[None]:
    """Loggers that hold the terminal itself write to the line's `sys.stderr` meanwhile."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict))]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    held = [each for each in handlers if isinstance(each, logging.StreamHandler) and each.stream is file]
    for handler in held:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in held:
            handler.setStream(file)


def _begin(line: Progress, name: str, phase: str) -> None:
    """Each phase is a task with a time of its own."""
    for task in line.task_ids:
        line.remove_task(task)
    line.add_task(phase, total=None, name=name, size="")


def _show(shown: ExitStack, line: Progress, name: str, progress: startup.Progress) -> None:
    if progress.phase == startup.READY:
        shown.close()
        return
    if progress.phase != line.tasks[0].description:
        _begin(line, name, progress.phase)
    if progress.total:
        size = size_of(progress.done, progress.total)
        line.update(line.task_ids[0], completed=progress.done, total=progress.total, size=size)


def size_of(done: int, total: int) -> str:
    """`0.3/16.1 GB`."""
    unit, name = pick_unit_and_suffix(total, ["bytes", "kB", "MB", "GB", "TB"], 1000)
    return f"{done / unit:.1f}/{total / unit:.1f} {name}"
