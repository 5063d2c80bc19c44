"""Tracks which ranks are alive by their heartbeats, so that a long step is not mistaken for a dead rank."""

from collections.abc import Sequence

from eagleray.cluster.core.executor import LOOK_S
from eagleray.cluster.runtime.process_state import DEAD, STOPPED, in_words, kill_if_stopped, state_of

STOPPED_S = 3.0  # silence after which a process that the kernel calls stopped or dead counts as such
SILENT_S = 15.0  # silence of one that it calls alive, or that is on another node: a busy machine is not a death
PATIENT_S = 120.0  # the same while imports, compilers or a profile hold the interpreter for long
_AWAY_S = 2.5  # a look that comes so late says that this process itself was stopped, and nothing of others


class VitalSigns:
    """When each rank was last heard. Times are those of `time.monotonic()`."""

    def __init__(self, here: Sequence[bool], now: float) -> None:
        """`here[rank]` says whether the rank runs on this node, where the kernel can be asked."""
        self._here = here
        self._heard = [now] * len(here)
        self._pids: list[int | None] = [None] * len(here)
        self._looked = now
        self.patient = True  # while ranks start, or write what may hold their interpreters for long

    def hear(self, rank: int, pid: int, now: float) -> None:
        """A rank has given a sign of life. One that does not exist is none."""
        if 0 <= rank < len(self._heard):
            self._heard[rank], self._pids[rank] = now, pid

    def is_due(self, now: float) -> bool:
        """Whether it is time to look again."""
        return now - self._looked >= LOOK_S

    def look(self, now: float) -> str | None:
        """The first rank that is stopped, dead or silent, in words; None if all live."""
        away, self._looked = now - self._looked > _AWAY_S, now
        if away:
            self._heard = [now] * len(self._heard)
            return None
        for rank, heard in enumerate(self._heard):
            silence_s, pid = now - heard, self._pids[rank]
            if pid is None or silence_s < STOPPED_S:  # one that was never heard is still on its way
                continue
            limit_s = PATIENT_S if self.patient else SILENT_S
            if silence_s >= limit_s or (self._here[rank] and state_of(pid) in STOPPED + DEAD):
                return f"rank {rank} has given no sign of life for {silence_s:.0f} s{self._why(rank)}"
        return None

    def kill_stopped(self) -> None:
        """End those on this node that are stopped, which Ray would wait for."""
        for rank, pid in enumerate(self._pids):
            if pid is not None and self._here[rank]:
                kill_if_stopped(pid)

    def suspects(self) -> str:
        """Ranks on this node that are stopped right now, in words for the end of a sentence."""
        stopped = [
            f"rank {rank}'s {in_words(pid)}"
            for rank, pid in enumerate(self._pids)
            if pid is not None and self._here[rank] and state_of(pid) in STOPPED + DEAD
        ]
        return ", ".join(stopped)

    def _why(self, rank: int) -> str:
        pid = self._pids[rank]
        return f" ({in_words(pid)})" if pid is not None and self._here[rank] else " (it is on another node)"
