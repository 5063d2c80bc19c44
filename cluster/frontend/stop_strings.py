"""Finds stop strings in a growing text in one pass, however many and long they are (Aho and Corasick 1975)."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """A state is the longest end of the text that a stop string begins with; 0 is none of it.

    Built once for all sequences of a request. Work is one look a character, plus at most one for each that came before.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]  # the longest that ends here
        for string in strings:
            self._insert(string)
        self._shorter = [0] * len(self._next)  # the state of the next shorter end of the text
        self._held = [0] * len(self._next)  # characters that are the beginning of a stop string, and not all of it
        self._link()

    def __bool__(self) -> bool:
        """Whether there are stop strings to look for."""
        return len(self._next) > 1

    def step(self, state: int, character: str) -> int:
        """The state after one more character."""
        while character not in self._next[state]:
            if state == 0:
                return 0
            state = self._shorter[state]
        return self._next[state][character]

    def scan(self, state: int, text: str, *, may_stop: bool) -> tuple[int, int, str | None]:
        """The state after more text, or up to the first stop string that ends in it; how much of it that is, and which.

        Without `may_stop` those that end in it do not count.
        """
        found, step = self._found, self.step
        for position, character in enumerate(text, 1):
            state = step(state, character)
            if may_stop and (string := found[state]):
                return state, position, string
        return state, len(text), None

    def found(self, state: int) -> str | None:
        """The longest stop string that ends the text."""
        return self._found[state]

    def num_held(self, state: int) -> int:
        """Characters at the text's end that a stop string begins with, and does not end with."""
        return self._held[state]

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
            state = self._next[state][character]
        self._found[state] = string

    def _link(self) -> None:
        """State by state in the order of their lengths."""
        states = deque([0])
        while states:
            state = states.popleft()
            for character, longer in self._next[state].items():
                states.append(longer)
                shorter = self._shorter[longer] = self.step(self._shorter[state], character) if state else 0
                self._found[longer] = self._found[longer] or self._found[shorter]
                self._held[longer] = self._depth[longer] if self._next[longer] else self._held[shorter]
