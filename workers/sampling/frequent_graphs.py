"""Graphs of what runs often, made when it does."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from eagleray.parallel.cuda_graphs import Replay
from eagleray.parallel.platform import platform_of

T = TypeVar("T")
OFTEN = 8  # runs, beyond which a graph is worth its capture: some milliseconds, as long as a few runs take to launch
MAX_GRAPHS = 256  # the one that was not used for longest makes room


class FrequentGraphs:
    """Runs functions that ask nothing of the host, and whose inputs stay in place; replays those that come often.

    Where nothing can be captured, a replay is a call. Ranks that make the same calls capture in the same ones.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs = platform_of(device).graphs
        self._pool: Any = None if self._graphs is None else self._graphs.pool()
        self._num_runs: OrderedDict[Hashable, int] = OrderedDict()
        self._replays: OrderedDict[Hashable, Replay[Any]] = OrderedDict()

    def run(self, key: Hashable, function: Callable[[], T]) -> T:
        """What `function` returns, which is the one of this `key`. The next run of any overwrites it."""
        replay = self._replays.get(key)
        if replay is None:
            if self._graphs is None or not self._is_frequent(key):
                return function()
            replay = self._replays[key] = self._graphs.capture_between_steps(function, self._pool)
            if len(self._replays) > MAX_GRAPHS:
                self._replays.popitem(last=False)
        self._replays.move_to_end(key)
        result: T = replay()
        return result

    def _is_frequent(self, key: Hashable) -> bool:
        """Count a run; only the latest keys are counted."""
        count = self._num_runs.pop(key, 0) + 1
        if count > OFTEN:
            return True
        self._num_runs[key] = count
        if len(self._num_runs) > 4 * MAX_GRAPHS:
            self._num_runs.popitem(last=False)
        return False
