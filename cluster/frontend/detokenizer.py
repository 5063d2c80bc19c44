"""Detokenises a sequence incrementally: never half a character, and no part of a stop string."""

from collections import deque
from collections.abc import Callable, Sequence

from eagleray.cluster.frontend.stop_strings import StopStrings
from eagleray.cluster.frontend.text_stream import TextStream


class Detokenizer:
    """One sequence's text, cut at the first stop string.

    The stop string completed first wins, of several completed by one character the longest: so the result does not
    depend on how the text was cut into tokens. What is shown never holds what a stop string might still take back.
    """

    def __init__(self, stream: TextStream, stop: StopStrings | Sequence[str] = (), *, keep_stop: bool = False) -> None:
        self._stream = stream
        self._stop = stop if isinstance(stop, StopStrings) else StopStrings(stop)
        self._keep_stop = keep_stop
        self._state = 0  # of `_stop`
        self._parts: list[str] = []  # all text, in a few parts, of which the later ones are shorter
        self._length = 0  # of it
        self.num_characters = 0  # of it that may be shown

    @property
    def text(self) -> str:
        """What may be shown."""
        return self.shown()()

    def shown(self, start: int = 0) -> Callable[[], str]:
        """A function that returns what may be shown by now, from this character on; only a call of it takes time."""
        parts: deque[str] = deque()
        begin = self._length
        for part in reversed(self._parts):
            if begin <= start:
                break
            parts.appendleft(part)
            begin -= len(part)
        first, last = max(start - begin, 0), self.num_characters - begin
        return lambda: _between(parts, first, last)

    def text_since(self, start: int) -> str:
        """What may be shown from this character on, near the end of the text."""
        if self._parts and start >= (begin := self._length - len(self._parts[-1])):
            return self._parts[-1][start - begin : self.num_characters - begin]
        return self.shown(start)()

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Take a token; the stop string that it completes, if `may_stop`, after which the sequence is over."""
        new = self._stream.push(token_id)
        if not new:
            return None
        before = self._length
        self._add(new)
        if self._stop:
            self._state, num_taken, found = self._stop.scan(self._state, new, may_stop=may_stop)
            if found is not None:
                self.num_characters = before + num_taken - (0 if self._keep_stop else len(found))
                return found
        held = 0 if self._keep_stop else self._stop.num_held(self._state)
        self.num_characters = self._length - held
        return None

    def flush(self) -> None:
        """The sequence ended without a stop string: show all of it."""
        self._add(self._stream.flush())
        self.num_characters = self._length

    def _add(self, new: str) -> None:
        """Parts are joined as soon as the one before is not longer: each character a few times, and few are left."""
        self._length += len(new)
        while self._parts and len(self._parts[-1]) <= len(new):
            new = self._parts.pop() + new
        self._parts.append(new)


def _between(parts: Sequence[str], first: int, last: int) -> str:
    """Characters `first` up to `last` of parts, where `first` is in the first one."""
    if not parts:
        return ""
    beginning, *others = parts
    return "".join([beginning[first:last], *others])[: last - first]
