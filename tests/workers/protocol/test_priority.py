"""Ranks run at normal priority where that is permitted."""

import os
import shutil
import subprocess
import sys

import pytest

SCRIPT = """
import os, threading
from pathlib import Path
from eagleray.workers.protocol.priority import run_at_normal_priority
over = threading.Event()
thread = threading.Thread(target=over.wait)
thread.start()
before = os.getpriority(os.PRIO_PROCESS, thread.native_id)
after = run_at_normal_priority()
print(before, after, os.getpriority(os.PRIO_PROCESS, thread.native_id))
over.set()
"""


def niceness(*prefix: str) -> list[int]:
    command = [*prefix, "nice", "-n", "9", sys.executable, "-c", SCRIPT]
    return [int(word) for word in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lower a niceness")
def test_all_threads_of_a_process_are_taken_to_nice_0() -> None:
    assert niceness() == [9, 0, 0]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root can give a right up")
def test_where_that_is_not_permitted_it_stays_and_is_told() -> None:
    assert niceness("setpriv", "--bounding-set=-sys_nice", "--inh-caps=-sys_nice", "--") == [9, 9, 9]
