"""Decodes a hub's messages; one that cannot be decoded affects nobody but its sender. Such a message is counted and
dropped, and the first one is logged.
"""

import logging
from collections.abc import Callable
from typing import Generic, TypeVar

from eagleray.workers.protocol.channel import MAX_DROPPED_AT_ONCE, Hub

logger = logging.getLogger(__name__)

Message = TypeVar("Message")


class Inbox(Generic[Message]):
    """`decode` raises `ValueError` or `RecursionError` for bytes that it cannot read, as msgspec's decoders do."""

    def __init__(self, hub: Hub, decode: Callable[[bytes], Message]) -> None:
        self.num_unreadable = 0
        self._hub = hub
        self._decode = decode

    def receive(self) -> tuple[bytes, Message] | None:
        """The next (peer, message), or None if there is none now."""
        for _ in range(MAX_DROPPED_AT_ONCE):
            if (received := self._hub.receive()) is None:
                return None
            peer, payload = received
            try:
                return peer, self._decode(payload)
            except (ValueError, RecursionError) as error:
                self._drop(peer, error)
        return None

    def _drop(self, peer: bytes, error: Exception) -> None:
        self.num_unreadable += 1
        if self.num_unreadable == 1:
            logger.error(
                "a message from %s cannot be read; it and further ones are dropped: %s",
                peer.decode(errors="replace"),
                error,
            )
