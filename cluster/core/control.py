"""Controls: what front ends have all ranks do between two steps, such as starting and stopping a profile."""

from collections.abc import Callable, Sequence
from typing import Protocol

from eagleray.cluster.core.messages import Control, ControlReply
from eagleray.cluster.core.request import FrontEndId
from eagleray.workers.protocol.messages import RankControl, RankReply


class Verb(Protocol):
    """What one kind of control, or several that belong together, asks of the ranks."""

    def begin(self, control: Control) -> RankControl:
        """What every rank is told. Raises `ValueError`, with nothing changed, if it cannot be done now."""

    def end(self, control: Control, replies: Sequence[RankReply]) -> tuple[ControlReply, RankControl | None]:
        """What the front end is told once every rank has replied, in the order of ranks.

        If some have failed, the second is what all are to undo before that.
        """


class Controls:
    """One at a time, over all front ends."""

    def __init__(self, send: Callable[[RankControl], None]) -> None:
        """`send` hands a message to every rank, in order with the steps."""
        self._send = send
        profiling = Profiling()
        self._verbs: dict[str, Verb] = {"start_profile": profiling, "stop_profile": profiling}
        self._asked: tuple[FrontEndId, Control] | None = None
        self._reply: ControlReply | None = None  # which waits for the ranks to undo what has failed

    @property
    def waits(self) -> bool:
        """Whether ranks still have to reply. No step is sent meanwhile: all of them change between the same two."""
        return self._asked is not None

    def ask(self, front_end: FrontEndId, control: Control) -> ControlReply | None:
        """Hand a front end's wish to the ranks; a reply at once if it cannot be done now."""
        if self._asked is not None:
            return ControlReply(control.id, error=f"{self._asked[1].verb} is under way; wait for it to end")
        if control.verb not in self._verbs:
            return ControlReply(control.id, error=f"{control.verb!r} is not one of {', '.join(self._verbs)}")
        try:
            self._send(self._verbs[control.verb].begin(control))
        except ValueError as error:
            return ControlReply(control.id, error=str(error))
        self._asked = (front_end, control)
        return None

    def collect(self, replies: Sequence[RankReply]) -> tuple[FrontEndId, ControlReply] | None:
        """Every rank has replied: whom to tell, and what; None while the ranks undo what has failed."""
        assert self._asked is not None
        front_end, control = self._asked
        if self._reply is None:
            self._reply, undo = self._verbs[control.verb].end(control, replies)
            if undo is not None:
                self._send(undo)
                return None
        reply, self._reply, self._asked = self._reply, None, None
        return front_end, reply


class Profiling:
    """One profile at a time: `start_profile` into a `directory`, and `stop_profile`, whose results are the files."""

    def __init__(self) -> None:
        self._directory: str | None = None  # of the profile that runs

    def begin(self, control: Control) -> RankControl:
        if control.verb == "stop_profile":
            if self._directory is None:
                raise ValueError("no profile is running; start one first")
            return RankControl("stop_profile")
        if self._directory is not None:
            raise ValueError(f"a profile into {self._directory} is already running; stop it first")
        self._directory = control.arguments.get("directory", "")
        return RankControl("start_profile", {"directory": self._directory})

    def end(self, control: Control, replies: Sequence[RankReply]) -> tuple[ControlReply, RankControl | None]:
        directory, undo = self._directory, None
        errors = [f"rank {reply.rank}: {reply.error}" for reply in replies if reply.error is not None]
        error = f"the profile cannot be written to {directory}: {'; '.join(errors)}" if errors else None
        if control.verb == "stop_profile":
            self._directory = None
        elif error is not None:
            self._directory, undo = None, RankControl("drop_profile")
        return ControlReply(control.id, [reply.result for reply in replies if reply.result], error), undo
