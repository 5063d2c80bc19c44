"""The progress bar and the tables of a benchmark."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from eagleray.deploy.bench.metrics import ServingFigures, Spread

TIMES = {
    "time_to_first_token_s": "time to first token",
    "time_per_output_token_s": "time per output token",
    "inter_token_latency_s": "inter-token latency",
    "latency_s": "end to end",
}


@contextmanager
def requests_bar(total: int, err: Console) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal while the context is entered; call what it yields with the number of requests that have
    ended.
    """
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda ended: progress.advance(task, ended)


def rates_table(figures: ServingFigures, goodput: Mapping[str, float]) -> Table:
    """What was done, and how much of it in a second. `goodput` are milliseconds."""
    shown = Table(show_header=False, show_edge=False, box=None, padding=(0, 2, 0, 0))
    rates = [
        (
            "requests",
            f"{figures.num_requests - figures.num_failed} of {figures.num_requests} in {figures.duration_s:.2f} s",
        ),
        ("requests/s", f"{figures.requests_per_s:.2f}"),
        ("input tokens/s", f"{figures.input_tokens_per_s:.1f}"),
        ("output tokens/s", f"{figures.output_tokens_per_s:.1f}"),
        ("total tokens/s", f"{figures.total_tokens_per_s:.1f}"),
    ]
    if figures.goodput_requests_per_s is not None:
        limits = ", ".join(f"{name} {most:g} ms" for name, most in goodput.items())
        rates.append(("goodput requests/s", f"{figures.goodput_requests_per_s:.2f} within {limits}"))
    for name, value in rates:
        shown.add_row(name, value)
    return shown


def times_table(figures: ServingFigures) -> Table:
    """Mean and percentiles in milliseconds."""
    shown = Table(title="ms", title_justify="left")
    shown.add_column("")
    for name in ("mean", "p50", "p90", "p95", "p99"):
        shown.add_column(name, justify="right")
    for attribute, name in TIMES.items():
        times: Spread | None = getattr(figures, attribute)
        cells = ["-"] * 5 if times is None else [f"{value * 1000:.2f}" for value in asdict(times).values()]
        shown.add_row(name, *cells)
    return shown
