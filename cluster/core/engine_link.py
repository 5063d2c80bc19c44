"""The interface between a front end and an engine, on Ray or in the same process."""

from collections.abc import Sequence
from typing import Protocol

from eagleray.cluster.core.messages import EngineOutputs, RequestMessage


class EngineLink(Protocol):
    """One front end's connection to an engine core. Once the core is gone, all but `close` raise `EngineDeadError`."""

    def send(self, message: RequestMessage) -> None:
        """Hand over a message, without waiting."""

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        """The next news, or None when the time is over, or `wake` was called."""

    def wake(self) -> None:
        """Let a `receive` of another thread return; of all methods this one may be called meanwhile."""

    async def areceive(self) -> Sequence[EngineOutputs]:
        """All news that are there, for asyncio: waits for the first, and leaves what is too much for one turn."""

    def close(self) -> None:
        """End the connection, and the engine if it was started with it."""
