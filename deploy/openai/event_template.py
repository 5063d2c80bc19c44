"""Events of a stream that differ in their text alone: written once, and then only the text is put in.

Making an event's objects and serialising them takes several times as long as all else that a token costs a server.
"""

from secrets import token_hex

import msgspec
from pydantic import BaseModel

TEXT = f"text {token_hex(16)}"  # stands for the text; nobody can know it, so nothing else of an event is equal
_ENCODER = msgspec.json.Encoder()


def event(chunk: BaseModel) -> bytes:
    """A server-sent event with a chunk's JSON, in which fields that are not set are left out."""
    return b"data: %b\n\n" % chunk.model_dump_json(exclude_unset=True).encode()


class EventTemplate:
    """Makes events like that of `chunk`, whose one text is `TEXT`."""

    def __init__(self, chunk: BaseModel) -> None:
        self._before, self._after = event(chunk).split(_ENCODER.encode(TEXT))

    def event(self, text: str) -> bytes:
        """The event with this text."""
        return self._before + _ENCODER.encode(text) + self._after
