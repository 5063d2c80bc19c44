"""How far a start is: put together from what the ranks tell, and shown on a terminal."""

import io
import logging
import os
import pty
import select
import sys
from collections.abc import Iterator
from typing import IO

import msgspec
import pytest
from rich.console import Console

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.runtime.start_display import shown_start
from eagleray.cluster.runtime.start_watch import AllRanks
from eagleray.workers.protocol.channel import Hub
from eagleray.workers.protocol.startup import GRAPHS, JOINING, PHASES, PROCESSES, READY, WEIGHTS, Progress
from eagleray.workers.startup_reporter import StartupReporter
from support.screen import screen

CONFIG = EngineConfig(model="/models/tiny [b]{0}", tensor_parallel_size=2)


def heard(*news: tuple[bytes, Progress]) -> list[Progress]:
    """The state of two ranks after each of the news."""
    ranks = AllRanks(2)
    states = [ranks.progress()]
    for rank, progress in news:
        ranks.hear(rank, progress)
        states.append(ranks.progress())
    return states


def test_the_phase_is_that_of_the_slowest_rank() -> None:
    told = [(b"a", JOINING), (b"a", WEIGHTS), (b"b", JOINING), (b"b", WEIGHTS), (b"b", GRAPHS), (b"a", GRAPHS)]
    states = heard(*((rank, Progress(phase)) for rank, phase in told))
    assert [state.phase for state in states] == [PROCESSES, PROCESSES, PROCESSES, JOINING, WEIGHTS, WEIGHTS, GRAPHS]


def test_bytes_are_those_of_all_ranks_once_all_have_counted() -> None:
    states = heard(
        (b"a", Progress(WEIGHTS, 5, 10)),
        (b"b", Progress(WEIGHTS)),
        (b"b", Progress(WEIGHTS, 1, 20)),
        (b"a", Progress(WEIGHTS, 10, 10)),
        (b"a", Progress(GRAPHS)),
        (b"b", Progress(WEIGHTS, 20, 20)),
    )
    counts = [(state.done, state.total) for state in states[2:]]
    assert counts == [(0, 0), (6, 30), (11, 30), (11, 30), (30, 30)]


def test_counts_are_told_seldom_but_for_the_last() -> None:
    hub = Hub()
    reporter = StartupReporter(1, hub.endpoint)
    reporter.begin(WEIGHTS)
    for done in range(10_001):
        reporter.count(done, 10_000)
    told: list[Progress] = []
    while Progress(WEIGHTS, 10_000, 10_000) not in told:
        assert hub.socket.poll(5000)
        while (news := hub.receive()) is not None:
            assert news[0] == b"rank 1"
            told.append(msgspec.msgpack.decode(news[1], type=Progress))
    assert told[:2] == [Progress(WEIGHTS), Progress(WEIGHTS, 0, 10_000)]
    assert len(told) < 1000
    reporter.close()
    hub.close()


class Terminal:
    """A pseudo-terminal. `file` is the program's side of it, `sent` what came out of it."""

    def __init__(self) -> None:
        self._ours, theirs = pty.openpty()
        self.file: IO[str] = os.fdopen(theirs, "w")
        self.sent = b""

    def wait_for(self, text: str) -> None:
        """Until `text` has been sent."""
        while text.encode() not in self.sent:
            assert select.select([self._ours], [], [], 10)[0], f"{text!r} never came; sent: {self.sent!r}"
            self.sent += os.read(self._ours, 65536)

    def screen(self) -> list[str]:
        """What is shown after all that the program has written, if it writes no more."""
        print("\x07", end="", file=self.file, flush=True)
        self.wait_for("\x07")
        return screen(self.sent.decode().replace("\x07", ""))

    def close(self) -> None:
        self.file.close()
        os.close(self._ours)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm")
    opened = Terminal()
    yield opened
    opened.close()


def test_a_terminal_shows_each_phase_and_keeps_nothing_of_it(terminal: Terminal) -> None:
    with shown_start(CONFIG, Console(file=terminal.file, width=80, color_system=None)) as on_progress:
        for phase in PHASES[:-1]:
            on_progress(Progress(phase))
            terminal.wait_for(f"starting tiny [b]{{0}} {phase} 0:00:0")
        on_progress(Progress(READY))
        print("the log's first line", file=terminal.file)
    assert terminal.screen() == ["the log's first line"]


def test_bytes_of_weights_are_shown_in_one_unit(terminal: Terminal) -> None:
    with shown_start(CONFIG, Console(file=terminal.file, width=80, color_system=None)) as on_progress:
        on_progress(Progress(WEIGHTS, 300_000_000, 16_060_000_000))
        terminal.wait_for("0.3/16.1 GB")
        on_progress(Progress(GRAPHS))
        terminal.wait_for(f"{GRAPHS} 0:00:0")
    assert terminal.screen() == []


def test_what_is_logged_meanwhile_stands_above_and_a_failure_leaves_no_line(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal.file)
    logger = logging.getLogger("somebody's own")
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler()])  # which holds on to the terminal

    def failing() -> None:
        with shown_start(CONFIG, Console(stderr=True, width=80, color_system=None)) as on_progress:
            on_progress(Progress(PROCESSES))
            print("a warning", file=sys.stderr)
            logger.warning("another")
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    logger.warning("later")
    assert terminal.screen() == ["a warning", "another", "later"]


def test_nothing_is_written_where_there_is_no_terminal() -> None:
    file = io.StringIO()
    with shown_start(CONFIG, Console(file=file, force_terminal=True)) as on_progress:
        for phase in PHASES:
            on_progress(Progress(phase, 1, 2))
    assert file.getvalue() == ""
