"""Handles SIGTERM as an exception, so that everything started is stopped on the way out."""

import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType

from eagleray.cluster.runtime.process_state import descendants

HARD_S = 20.0  # after which a process that was to end is ended, with all that it has started


def end_on_sigterm() -> None:
    """From now on SIGTERM raises `SystemExit` with status 143. Other handlers than the default are left alone.

    Only the main thread can receive signals; in another this does nothing.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def _end(signum: int, _frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_IGN)  # more of them would interrupt the end
    hard = threading.Timer(HARD_S, _end_hard, (128 + signum,))
    hard.daemon = True
    hard.start()
    sys.exit(128 + signum)


def _end_hard(code: int) -> None:
    kill(descendants(os.getpid()))
    os._exit(code)


def kill(pids: set[int]) -> None:
    """Processes that are still there end now."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
