"""Sends requests to an engine when they are due, and records when each of their tokens arrives."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eagleray.cluster.core.messages import Abort, Submit
from eagleray.cluster.frontend.prompts import Prompt
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.bench.metrics import RequestTimes

if TYPE_CHECKING:
    from eagleray.cluster.core.engine_link import EngineLink
    from eagleray.cluster.frontend.front_end import FrontEnd
    from eagleray.cluster.frontend.request_state import RequestState

WAKE_S = 1.0  # so that Ctrl-C is noticed while an engine is silent


@dataclass(frozen=True)
class Planned:
    """A request of one sequence, to be sent `due` seconds after the start."""

    prompt: Prompt
    params: SamplingParams
    due: float = 0.0


class Load:
    """An engine's requests and their times, on the clock of `time.monotonic()`.

    It works on the front end's own bookkeeping and makes no outputs, so that at many tokens a second the engine is
    measured and not the caller. Its methods raise `EngineDeadError` if the engine is gone.
    """

    def __init__(self, engine: "EngineLink", front_end: "FrontEnd") -> None:
        self._engine = engine
        self._front_end = front_end
        self._running: dict[RequestState, RequestTimes] = {}

    @property
    def num_running(self) -> int:
        """Requests that were sent and have not ended."""
        return len(self._running)

    def make_requests(self, planned: Sequence[Planned]) -> "list[RequestState]":
        """Tokenise and check requests. Raises `ValueError` for one that cannot run."""
        return [self._front_end.make_request(each.prompt, each.params) for each in planned]

    def send(self, generations: "Sequence[RequestState]", due: Sequence[float]) -> list[RequestTimes]:
        """Submit requests that were due at these times; their times fill up with `receive`."""
        times = [
            RequestTimes(due=when, num_input_tokens=len(generation.prompt_token_ids))
            for generation, when in zip(generations, due, strict=True)
        ]
        self._running |= zip(generations, times, strict=True)
        self._engine.send(Submit([self._front_end.add(each) for each in generations]))
        return times

    def receive(self, timeout_s: float) -> "list[RequestState]":
        """Take the engine's next news, for which it waits so long; the requests that they end."""
        news = self._engine.receive(timeout_s)
        if news is None:
            return []
        changed, aborts = self._front_end.process(news)
        if aborts:
            self._engine.send(Abort(aborts))
        now = time.monotonic()
        for generation in changed:
            self._note(generation, now)
        ended = [generation for generation in changed if generation.finished]
        for generation in ended:
            del self._running[generation]
        return ended

    def _note(self, generation: "RequestState", now: float) -> None:
        times, completion = self._running[generation], generation.completions[0]
        times.tokens += [now] * (len(completion.token_ids) - len(times.tokens))
        times.error = completion.error

    def abort(self) -> None:
        """End what runs."""
        ids = [id for generation in self._running for id in self._front_end.abort(generation)]
        self._running.clear()
        if ids:
            self._engine.send(Abort(ids))

    def measure(
        self, planned: Sequence[Planned], on_end: "Callable[[list[RequestState]], None] | None" = None
    ) -> list[RequestTimes]:
        """Send every request when it is due and wait for all to end. They must be in the order of their due times."""
        waiting = deque(zip(self.make_requests(planned), (each.due for each in planned), strict=True))
        start = time.monotonic()
        times: list[RequestTimes] = []
        while waiting or self._running:
            now = time.monotonic() - start
            if waiting and waiting[0][1] <= now:
                late = [waiting.popleft() for _ in range(sum(due <= now for _, due in waiting))]
                times += self.send([each for each, _ in late], [start + due for _, due in late])
            ended = self.receive(min(waiting[0][1] - now, WAKE_S) if waiting else WAKE_S)
            if on_end is not None:
                on_end(ended)
        return times
