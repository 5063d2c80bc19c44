"""Which ranks count as living: silence and what the kernel says, over a time that the test makes up."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from eagleray.cluster.runtime.process_state import state_of
from eagleray.cluster.runtime.vital_signs import PATIENT_S, SILENT_S, VitalSigns


@pytest.fixture
def other() -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGSTOP)
    while state_of(process.pid) != "T":
        pass


def signs(*pids: int, here: bool = True, patient: bool = False) -> VitalSigns:
    signs = VitalSigns([here] * len(pids), 0.0)
    for rank, pid in enumerate(pids):
        signs.hear(rank, pid, 0.0)
    signs.patient = patient
    return signs


def faults(signs: VitalSigns, until: float, *living: int) -> list[tuple[float, str]]:
    """Looks once a second, and hears the living ones; what is found, and when."""
    found = []
    for second in range(1, int(until) + 1):
        for rank in living:
            signs.hear(rank, os.getpid(), float(second))
        if fault := signs.look(float(second)):
            found.append((float(second), fault))
    return found


def test_a_stopped_rank_is_named_within_a_few_seconds(other: "subprocess.Popen[bytes]") -> None:
    stop(other)
    found = faults(signs(os.getpid(), other.pid), 3, 0)
    assert found == [(3.0, f"rank 1 has given no sign of life for 3 s (process {other.pid} is stopped)")]


def test_a_rank_that_is_only_slow_has_more_time() -> None:
    """A machine under load, or a step that holds the interpreter: the kernel calls the process alive."""
    ((when, fault),) = faults(signs(os.getpid(), os.getpid()), SILENT_S, 0)
    assert when == SILENT_S
    assert fault.startswith("rank 1 has given no sign of life for 15 s (process ")
    assert not faults(signs(os.getpid(), os.getpid(), patient=True), PATIENT_S - 1, 0)
    assert faults(signs(os.getpid(), os.getpid(), patient=True), PATIENT_S, 0)


def test_the_kernel_is_asked_only_about_processes_of_this_machine(other: "subprocess.Popen[bytes]") -> None:
    stop(other)
    ((when, fault),) = faults(signs(os.getpid(), other.pid, here=False), SILENT_S, 0)
    assert (when, fault) == (SILENT_S, "rank 1 has given no sign of life for 15 s (it is on another node)")


def test_whoever_was_stopped_itself_blames_nobody(other: "subprocess.Popen[bytes]") -> None:
    stop(other)
    stopped = signs(other.pid)
    assert stopped.look(1.0) is None
    assert stopped.look(100.0) is None, "it did not look for 99 seconds"
    assert stopped.look(102.0) is None
    assert stopped.look(103.0) is not None
    assert stopped.suspects() == f"rank 0's process {other.pid} is stopped"


def test_a_stopped_rank_can_be_ended(other: "subprocess.Popen[bytes]") -> None:
    both = signs(other.pid, os.getpid())
    both.kill_stopped()
    assert other.poll() is None, "it runs"
    stop(other)
    both.kill_stopped()
    assert other.wait(30) == -signal.SIGKILL


def test_a_rank_that_lives_again_is_no_suspect(other: "subprocess.Popen[bytes]") -> None:
    stop(other)
    again = signs(other.pid)
    assert again.look(2.0) is None
    other.send_signal(signal.SIGCONT)
    again.hear(0, other.pid, 2.5)
    assert again.look(4.0) is None
    assert again.suspects() == ""


def test_a_rank_that_was_never_heard_is_still_on_its_way() -> None:
    silent = VitalSigns([True], 0.0)
    assert faults(silent, 1000) == []


def test_beats_of_ranks_that_do_not_exist_change_nothing() -> None:
    one = signs(os.getpid())
    for rank in (-1, 1, 2**40):
        one.hear(rank, 1, 1.0)
    assert one.look(2.0) is None
