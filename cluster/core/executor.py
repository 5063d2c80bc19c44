"""The interface between the engine core and its ranks."""

from collections.abc import Sequence
from typing import Any, Protocol

from eagleray.workers.protocol.messages import RankControl, RankReply, Step, StepOutput

LOOK_S = 1.0  # between checks, while waiting for ranks, that they are alive


class RankFailedError(RuntimeError):
    """A rank is gone or stuck; the message names it and the cause."""


class Executor(Protocol):
    """What the engine core needs of its ranks."""

    @property
    def pollable(self) -> Sequence[Any]:
        """Sockets and file descriptors that become readable when `receive` has something to say, until `stop`."""

    def start(self, size: int) -> int:
        """Start `size` ranks; how many KV blocks all of them have. Ranks that ran before were stopped."""

    def send(self, message: Step | RankControl) -> None:
        """Hand a message to every rank, without waiting; they take it in order. Raises `RankFailedError`."""

    def receive(self) -> StepOutput | list[RankReply] | None:
        """The next output, or all ranks' replies to a control; None if nothing is there. Raises `RankFailedError`."""

    def suspects(self) -> str:
        """Ranks that are stopped, in words; empty if none is."""

    def stop(self) -> None:
        """End the ranks; `start` may be called again."""
