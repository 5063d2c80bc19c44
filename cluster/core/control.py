"""Tracks whether the ranks are profiling, and which front end waits for the answer."""

from collections.abc import Callable, Sequence

from eagleray.cluster.core.messages import ProfileAnswer, StartProfile, StopProfile
from eagleray.cluster.core.request import FrontEndId
from eagleray.workers.protocol.messages import Profile, Profiled


class Profiling:
    """One profile at a time, over all front ends."""

    def __init__(self, send: Callable[[Profile], None]) -> None:
        self._send = send  # to every rank, in order with the steps
        self._directory: str | None = None  # of the profile that runs or is about to
        self._asked: tuple[FrontEndId, StartProfile | StopProfile] | None = None

    @property
    def waits(self) -> bool:
        """Whether ranks still have to answer. No step is sent meanwhile: the profile holds whole steps of all ranks."""
        return self._asked is not None

    def ask(self, front_end: FrontEndId, message: StartProfile | StopProfile) -> ProfileAnswer | None:
        """Hand a front end's wish to the ranks; an answer at once if it cannot be done now."""
        if self._asked is not None:
            return ProfileAnswer(message.id, error="a profile is being started or stopped; wait for that to end")
        if isinstance(message, StopProfile):
            if self._directory is None:
                return ProfileAnswer(message.id, error="no profile runs; start one first")
            self._send(Profile("stop"))
        else:
            if self._directory is not None:
                return ProfileAnswer(message.id, error=f"a profile into {self._directory} runs already; stop it first")
            self._directory = message.directory
            self._send(Profile("start", message.directory))
        self._asked = (front_end, message)
        return None

    def take(self, profiled: Sequence[Profiled]) -> tuple[FrontEndId, ProfileAnswer]:
        """Every rank's answer: whom to tell, and what. If one rank could not start, the others drop what they have."""
        assert self._asked is not None
        (front_end, message), self._asked = self._asked, None
        directory = self._directory
        errors = [f"rank {each.rank}: {each.error}" for each in profiled if each.error is not None]
        error = f"the profile cannot be written to {directory}: {'; '.join(errors)}" if errors else None
        if isinstance(message, StopProfile):
            self._directory = None
        elif error is not None:
            self._directory = None
            self._send(Profile("drop"))
        files = [each.file for each in profiled if each.file]
        return front_end, ProfileAnswer(message.id, files, error)
