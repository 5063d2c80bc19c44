"""Accounts for the engine's time while it has work: cumulative seconds, so that a request's time is a difference.

Nothing is kept per token. Of what happens at once only one gets the time, and the parts add up to the time that passed:
first comes what the ranks computed, as rank 0 reports it, then the engine core's own work as far as the ranks did not
compute meanwhile. The rest is what a step's way to the ranks and back took.
"""

import time

import msgspec


class Spent(msgspec.Struct, frozen=True, array_like=True):
    """Seconds since the engine's start in which it had work."""

    schedule: float = 0.0  # the engine core worked, and no rank
    broadcast: float = 0.0  # neither did: a step or its output was being sent, or not taken yet
    gpu: float = 0.0  # the ranks ran a step, from its launch to its output

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(self.schedule - other.schedule, self.broadcast - other.broadcast, self.gpu - other.gpu)


NOTHING = Spent()


class Begun(msgspec.Struct, frozen=True, array_like=True):
    """A request runs, maybe again: what it has spent is the engine's `Spent` less `before`."""

    queue: float  # seconds that it waited, from its arrival until the ranks were free for its first step
    before: Spent


class TimeAccounting:
    """One window of time per step: from the output before, or from when there was work again, to its output."""

    def __init__(self) -> None:
        self.spent = NOTHING
        self.time = 0.0  # of `time.monotonic()`: when the present window began
        self._elsewhere_s = 0.0  # of the present window, what the engine core spent on sending or asleep
        self._stopped = True

    def start(self, now: float) -> None:
        """There is a step to run; if there was none, a window begins."""
        if self._stopped:
            self._stopped = False
            self._begin(now)

    def stop(self) -> None:
        """There is nothing to run, for now."""
        self._stopped = True

    def send_or_sleep(self, seconds: float) -> None:
        """The engine core spent this much of the window on sending steps, or on waiting for something to do."""
        self._elsewhere_s += seconds

    def end_step(self, gpu_s: float) -> None:
        """A step's output is here; the ranks spent `gpu_s` on it and on no other."""
        now = time.monotonic()
        passed = max(0.0, now - self.time)
        gpu = min(gpu_s, passed)
        schedule = min(max(0.0, passed - self._elsewhere_s), passed - gpu)
        before = self.spent
        self.spent = Spent(before.schedule + schedule, before.broadcast + passed - gpu - schedule, before.gpu + gpu)
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.time = now
        self._elsewhere_s = 0.0
