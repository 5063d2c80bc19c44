"""How far a server's start is, as a log has it."""

import logging
import threading

import pytest

from eagleray.deploy.serve.progress import Lines
from eagleray.workers.protocol.startup import READY, WEIGHTS, Progress


class Heard(logging.Handler):
    """Lines of a log, and whether there are as many as wanted."""

    def __init__(self, wanted: int) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.wanted = wanted
        self.enough = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        if len(self.lines) == self.wanted:
            self.enough.set()


def test_a_log_has_a_line_now_and_then_until_the_model_is_ready(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eagleray")
    heard = Heard(wanted=3)
    logging.getLogger("eagleray").addHandler(heard)
    try:
        lines = Lines("tiny", period_s=0.01)
        lines.hear(Progress(WEIGHTS, 300_000_000, 16_100_000_000))
        assert heard.enough.wait(20)
        lines.hear(Progress(READY))
        lines.close()
    finally:
        logging.getLogger("eagleray").removeHandler(heard)
    assert heard.lines[-1].startswith("starting tiny: weights 0.3/16.1 GB, ")
