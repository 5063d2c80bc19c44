"""Predicts the least time that a step takes, from what steps of about its size took before.

The engine core uses it to schedule a step no earlier than the ranks need it: a request that arrives during a long step
is then in the next one, and not in the one after that.
"""

from collections import defaultdict, deque
from functools import partial

LEAD_S = 0.005  # before the ranks are done with a step they need the next, to lay it out and start it
TELL_S = 1e-7  # and so much before that for each token of a prompt that may begin: it is looked up, packed and sent
NUM_KEPT = 16  # lately measured steps of a size: what they took also depends on how much context they read
SURE = 0.9  # of the least of them, since the next may be quicker still
NUM_NEEDED = 3  # before which nothing is foretold: the first of a size may compile something


class StepForecast:
    """Keeps what the last steps of each size took; sizes that differ by less than a fourth or so count as one."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = defaultdict(partial(deque, maxlen=NUM_KEPT))

    def learn(self, num_tokens: int, seconds: float) -> None:
        """Record how long a step of this many tokens took."""
        self._seconds[_size(num_tokens)].append(seconds)

    def at_least(self, num_tokens: int) -> float:
        """The least number of seconds that a step of this many tokens will take; 0 if too little is known."""
        seconds = self._seconds.get(_size(num_tokens), ())
        return SURE * min(seconds) if len(seconds) >= NUM_NEEDED else 0.0


def lead(num_waiting_tokens: int) -> float:
    """How many seconds before the ranks are done the next step is to be scheduled, with so many tokens of prompts."""
    return LEAD_S + TELL_S * num_waiting_tokens


def _size(num_tokens: int) -> int:
    """The number with all but its first three binary digits cleared."""
    shift = max(0, num_tokens.bit_length() - 3)
    return num_tokens >> shift << shift
