"""The scheduler and one rank in this process, without sockets: what the engine core does, in three lines."""

from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from eagleray.cluster.core.messages import EngineRequest, Tokens
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.workers.protocol.messages import Sampling, Step, StepOutput

ME = b"front end"


class Rank(Protocol):
    def run(self, step: Step) -> StepOutput: ...


class InlineEngine:
    """Runs requests to their end, with up to `depth` steps in flight."""

    def __init__(self, scheduler: Scheduler, rank: Rank, depth: int = 1) -> None:
        self.scheduler = scheduler
        self.news: dict[int, list[Tokens]] = {}
        self._rank = rank
        self._depth = depth
        self._in_flight: deque[Callable[[], StepOutput]] = deque()

    def add(
        self,
        request_id: int,
        prompt: Sequence[int],
        max_tokens: int = 8,
        priority: int = 0,
        *,
        n: int = 1,
        group: str = "",
        tenant: str = "",
        **sampling: Any,
    ) -> None:
        """Ask for `n` sequences, whose ids count up."""
        token_ids, seeds = array("i", prompt).tobytes(), list(range(1, n))
        request = EngineRequest(request_id, token_ids, Sampling(**sampling), max_tokens, priority, seeds, group, tenant)
        self.scheduler.add(ME, request)
        self.news |= {request_id + index: [] for index in range(n)}

    def abort(self, request_id: int) -> None:
        if tokens := self.scheduler.abort(ME, request_id):
            self.news[request_id].append(tokens)

    def replace_rank(self, rank: Rank, num_blocks: int) -> None:
        """The rank is gone with the steps in flight, and this one takes its place."""
        self._rank = rank
        self._in_flight.clear()
        for _, tokens in self.scheduler.requeue_all(num_blocks):
            self.news[tokens.id].append(tokens)

    def turn(self) -> bool:
        """Fill the pipeline, then take one step's output; False when there is nothing left to do."""
        while self.scheduler.num_in_flight < self._depth and (step := self.scheduler.schedule()):
            self._in_flight.append(self._launch(step))
        if not self._in_flight:
            return False
        for _, tokens in self.scheduler.update(self._in_flight.popleft()()):
            self.news[tokens.id].append(tokens)
        return True

    def _launch(self, step: Step) -> Callable[[], StepOutput]:
        """Start a step; what is returned waits for its output."""
        output = self._rank.run(step)
        return lambda: output

    def run(self) -> None:
        while self.turn():
            pass
        assert self.scheduler.num_unfinished == 0, "requests are left that nobody runs"

    def token_ids(self, request_id: int) -> list[int]:
        return [token_id for tokens in self.news[request_id] for token_id in tokens.token_ids]

    def finish_reason(self, request_id: int) -> str | None:
        assert all(tokens.finish_reason is None for tokens in self.news[request_id][:-1]), "news after the end"
        return self.news[request_id][-1].finish_reason if self.news[request_id] else None
