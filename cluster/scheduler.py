"""What to run next. There are no phases: a slice of a prompt and a decode of one token are both tokens of a request."""

import heapq
import logging
import time
from array import array
from bisect import insort
from collections import deque
from operator import attrgetter, itemgetter

from eagleray.cluster.block_pool import BlockPool
from eagleray.cluster.caution import Caution
from eagleray.cluster.messages import EngineRequest, EngineStats, Tokens
from eagleray.cluster.plan import InFlight, Plan
from eagleray.cluster.request import FrontEndId, Request
from eagleray.cluster.step_clock import StepClock
from eagleray.workers.wire import Step, StepOutput

logger = logging.getLogger(__name__)

News = tuple[FrontEndId, Tokens]
NOT_FINITE = (
    "the model's logits for this request are NaN or infinite, so no token can be drawn; its weights or its precision "
    "do not stand this prompt: try a dtype with a wider range (bfloat16 or float32), or check the checkpoint"
)


def headroom(num_blocks: int) -> int:
    """Blocks left to those who run, so that a newcomer is not preempted in the next step: one hundredth of all."""
    return max(1, num_blocks // 100)


class Scheduler:
    """Turns requests into steps, and step outputs into news. Any number of steps may be in flight.

    Ranks run steps in the order in which they are scheduled. So a row or a block may go to another request in the step
    after its last use, even while that use is still in flight, and a block may be shared before it is written.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_slice_tokens: int | None = None,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = BlockPool(num_blocks)
        self.clock = StepClock()
        self._block_size = block_size
        self._caution = Caution(max_num_batched_tokens, max_num_seqs)
        self._max_slice_tokens = max_slice_tokens or max_num_batched_tokens
        self._caching = enable_prefix_caching
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first keeps batches dense
        self._stopped_rows: list[int] = []  # not told to the ranks yet
        self._requests: dict[tuple[FrontEndId, int], Request] = {}
        self._waiting: list[tuple[int, int, Request]] = []  # a heap; finished requests in it are skipped
        self._running: list[Request] = []  # in order; the last is preempted first
        self._in_flight: deque[InFlight] = deque()
        self._untold: dict[tuple[FrontEndId, int], Request] = {}  # that began and had no news since
        self._restart = False  # the next step is the first after one that ran out of memory
        self._num_steps = 0
        self._num_arrived = 0
        self._num_preemptions = 0
        self._num_prefix_hit_tokens = 0

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def knows(self, front_end: FrontEndId, request_id: int) -> bool:
        """Whether a request of this id waits or runs."""
        return (front_end, request_id) in self._requests

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._running),
            num_waiting=len(self._requests) - len(self._running),
            num_used_blocks=self.pool.num_used,
            num_blocks=self.pool.num_blocks,
            num_preemptions=self._num_preemptions,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            spent=self.clock.spent,
        )

    # ---- requests come and go

    def add(self, front_end: FrontEndId, wire: EngineRequest) -> None:
        """Accept a request. Raises `ValueError` if its id is in use or it could never fit the KV cache."""
        request = Request.from_wire(front_end, wire, self._num_arrived)
        key = (front_end, wire.id)
        if key in self._requests:
            raise ValueError(f"request id {wire.id} is already in use; give every request of a front end its own")
        capacity = self.pool.num_blocks * self._block_size
        if request.num_prompt_tokens + request.max_tokens - 1 > capacity:
            raise ValueError(
                f"the prompt has {request.num_prompt_tokens} tokens and max_tokens is {request.max_tokens}, but the KV "
                f"cache holds {capacity} tokens; shorten one of them or give the KV cache more memory"
            )
        self._num_arrived += 1
        self._requests[key] = request
        heapq.heappush(self._waiting, (*request.order, request))

    def abort(self, front_end: FrontEndId, request_id: int) -> Tokens | None:
        """End a request at once, whatever it is doing; None if it has ended already."""
        request = self._requests.get((front_end, request_id))
        return None if request is None else self._end(request, Tokens(request_id, finish_reason="abort"))

    def abort_front_end(self, front_end: FrontEndId) -> None:
        """End every request of a front end that is gone."""
        for owner, request_id in list(self._requests):
            if owner == front_end:
                self.abort(owner, request_id)

    def fail(self, cause: str) -> list[News]:
        """End every request with an error: the ranks are gone."""
        self._in_flight.clear()
        news = [
            (request.front_end, self._end(request, Tokens(request.id, finish_reason="error", error=cause)))
            for request in list(self._requests.values())
        ]
        self.pool.forget_prefixes()
        return news

    def _end(self, request: Request, news: Tokens) -> Tokens:
        request.finished = True
        self._caution.note_end()
        del self._requests[request.front_end, request.id]
        if request.row is not None:
            self._running.remove(request)
            self._vacate(request)
        return news

    def _vacate(self, request: Request) -> None:
        """Take a running request's row and blocks away; what is in flight for it still runs, and harms nothing."""
        assert request.row is not None
        self._publish(request)
        self.pool.release(request.block_ids)
        heapq.heappush(self._free_rows, request.row)
        self._stopped_rows.append(request.row)
        request.row = None
        request.block_ids = []
        request.num_computed_tokens = request.quiet_until = 0

    # ---- a step is made

    def schedule(self) -> Step | None:
        """Fill the token budget: running requests first, then waiting ones. None if nothing can run now."""
        begin = time.monotonic()
        max_tokens = self._caution.max_tokens
        plan = Plan(max_tokens)
        self._continue_running(plan)
        if not plan.preempted:
            self._admit_waiting(plan)
        if not plan.slices:
            if not self._in_flight:
                self.clock.stop()
            return None
        plan.slices.sort(key=itemgetter(1))
        self._num_steps += 1
        self._in_flight.append(InFlight(self._num_steps, plan.slices, max_tokens - plan.budget, plan.started))
        self.clock.start(begin)
        stopped, self._stopped_rows = self._stopped_rows, []
        if len(plan.slices) < len(self._running):
            plan.rest(self._running)
        restart, self._restart = self._restart, False
        return Step(self._num_steps, stopped, plan.starts, plan.blocks, plan.uneven, restart)

    def _continue_running(self, plan: Plan) -> None:
        """Most requests decode one token, with nothing to look after until `quiet_until`: those are done at once."""
        add = plan.slices.append
        num_quiet = 0
        for request in self._running:  # preemption shortens the list behind this request, or ends with it
            if plan.budget <= num_quiet:
                break
            row, start = request.row, request.num_computed_tokens
            assert row is not None
            if start < request.quiet_until and request.num_known_tokens == start + 1:
                request.num_computed_tokens = start + 1
                request.num_known_tokens = start + 2
                num_quiet += 1
                add((request, row, start, True))
                continue
            num_tokens = min(request.num_runnable_tokens, plan.budget - num_quiet, self._max_slice_tokens)
            if num_tokens > 0 and self._grow(request, num_tokens, plan):
                self._run(request, num_tokens, plan)
        plan.budget -= num_quiet

    def _grow(self, request: Request, num_tokens: int, plan: Plan) -> bool:
        """Give a running request the blocks of its next tokens; False if it had to be preempted itself."""
        missing = -(-(request.num_computed_tokens + num_tokens) // self._block_size) - len(request.block_ids)
        if missing <= 0:
            return True
        while self.pool.num_free < missing:
            plan.preempted = True
            victim = self._running.pop()
            self._preempt(victim)
            if victim is request:
                return False
        blocks = self.pool.take(missing)
        request.block_ids += blocks
        assert request.row is not None
        plan.blocks[request.row] = blocks
        return True

    def _preempt(self, request: Request) -> None:
        """Let a request wait again; its prompt and committed tokens are computed anew later."""
        self._vacate(request)
        self._num_preemptions += 1
        request.wait_again(self.clock)
        heapq.heappush(self._waiting, (*request.order, request))

    def _run(self, request: Request, num_tokens: int, plan: Plan) -> None:
        row, start = request.row, request.num_computed_tokens
        assert row is not None
        request.num_computed_tokens = end = start + num_tokens
        request.quiet_until = min(len(request.block_ids) * self._block_size, request.max_computed_tokens)
        samples = end == request.num_known_tokens
        request.num_known_tokens += samples
        plan.budget -= num_tokens
        plan.slices.append((request, row, start, samples))
        if num_tokens != 1:
            plan.uneven[row] = num_tokens
        self._publish(request)

    def _publish(self, request: Request) -> None:
        """Let full blocks of committed tokens be found by others."""
        if not self._caching or not request.is_finite:
            return
        num_full = min(request.num_computed_tokens, len(request.token_ids)) // self._block_size
        if num_full <= request.num_published:
            return
        request.hash_full_blocks(self._block_size)
        for index in range(request.num_published, num_full):
            self.pool.publish(request.block_ids[index], request.block_hashes[index])
        request.num_published = num_full

    def _admit_waiting(self, plan: Plan) -> None:
        while self._waiting and self._free_rows and plan.budget > 0 and len(self._running) < self._caution.max_requests:
            request = self._waiting[0][-1]
            if not request.finished:
                if request.awaits_tokens or not self._admit(request, plan):
                    break  # a preempted request waits for its tokens in flight; nobody overtakes
                insort(self._running, request, key=attrgetter("order"))
            heapq.heappop(self._waiting)

    def _admit(self, request: Request, plan: Plan) -> bool:
        """Start a waiting request in a row if its first slice finds blocks."""
        cached = self._find_prefix(request)
        num_cached = len(cached) * self._block_size
        num_tokens = min(request.num_runnable_tokens - num_cached, plan.budget, self._max_slice_tokens)
        missing = -(-(num_cached + num_tokens) // self._block_size) - len(cached)
        spare = headroom(self.pool.num_blocks) if self._running else 0
        if self.pool.num_free - self.pool.num_free_among(cached) < missing + spare:
            return False
        self.pool.share(cached)
        request.block_ids = cached + self.pool.take(missing)
        request.num_computed_tokens = num_cached
        request.num_published = len(cached)
        request.row = heapq.heappop(self._free_rows)
        plan.starts.append(request.row_start())
        plan.started.append(request)
        self._num_prefix_hit_tokens += num_cached
        if request.num_cached_tokens is None:
            request.num_cached_tokens = num_cached
        self._run(request, num_tokens, plan)
        return True

    def _find_prefix(self, request: Request) -> list[int]:
        """The cached blocks that begin a request. Its last token always runs, since its logits are wanted."""
        if not self._caching or request.wants_prompt_logprobs:
            return []
        request.hash_full_blocks(self._block_size)
        return self.pool.match(request.block_hashes[: (len(request.token_ids) - 1) // self._block_size])

    # ---- a step is done

    def update(self, output: StepOutput) -> list[News]:
        """Commit what the oldest step in flight sampled. Tokens of requests that have ended meanwhile are dropped."""
        due = self._in_flight.popleft()
        assert due.step == output.step, f"step {output.step} returned while step {due.step} was due"
        self._end_window(due, output.gpu_seconds)
        if output.out_of_memory:
            return self._begin_anew(due, output.out_of_memory)
        sampled = iter(array("i", output.token_ids))
        news: list[News] = []
        for request, row, start, samples in due.slices:
            token_id = next(sampled) if samples else None
            if request.finished:
                continue
            if output.not_finite and row in output.not_finite:
                news.append((request.front_end, self._end_not_finite(request)))
                continue
            tokens = Tokens(request.id)
            if output.prompt_logprobs and row in output.prompt_logprobs:
                tokens.prompt_logprobs = request.take_prompt_logprobs(start, output.prompt_logprobs[row])
            if token_id is not None:
                if output.logprobs and row in output.logprobs:
                    tokens.logprobs.append(output.logprobs[row])
                self._commit(request, token_id, tokens)
            elif not tokens.prompt_logprobs:
                continue
            news.append((request.front_end, tokens))
        if self._untold:
            self._tell_begun(news)
        return news

    def _end_window(self, due: InFlight, gpu_s: float) -> None:
        """The clock's window of a step ends, and with it the wait of those that it took from the queue."""
        began, before = self.clock.time, self.clock.spent
        self.clock.end_step(gpu_s)
        for request in due.started:
            if request.row is not None and request.waits_since is not None:
                request.begin(began, before)
                self._untold[request.front_end, request.id] = request

    def _tell_begun(self, news: list[News]) -> None:
        for front_end, tokens in news:
            if request := self._untold.pop((front_end, tokens.id), None):
                tokens.begun = request.begun
        self._untold = {key: request for key, request in self._untold.items() if not request.finished}

    def _commit(self, request: Request, token_id: int, tokens: Tokens) -> None:
        if len(request.token_ids) == request.num_prompt_tokens:
            tokens.num_cached_tokens = request.num_cached_tokens
        tokens.token_ids.append(token_id)
        tokens.finish_reason = request.commit(token_id)
        if tokens.finish_reason:
            self._end(request, tokens)

    def _end_not_finite(self, request: Request) -> Tokens:
        """Nothing can be drawn for it; what it has written since its prefix was found in the cache is offered no more.

        Ranks clean such blocks before they go to another request.
        """
        request.is_finite = False
        self.pool.unpublish(request.block_hashes[(request.num_cached_tokens or 0) // self._block_size :])
        return self._end(request, Tokens(request.id, finish_reason="error", error=NOT_FINITE))

    # ---- a step ran out of memory

    def _begin_anew(self, failed: InFlight, cause: str) -> list[News]:
        """The step did not run, nor will those behind it: all requests go back to their committed tokens and wait.

        What runs next is smaller. A request whose single token does not fit by itself ends with an error.
        """
        for due in self._in_flight:
            due.slices = []
        while self._running:
            self._preempt(self._running.pop())
        for request in self._requests.values():
            request.num_known_tokens = len(request.token_ids)
        self.pool.forget_prefixes()  # some were to be written by the steps that did not run
        self._stopped_rows.clear()
        self._restart = True
        request = failed.slices[0][0]
        if failed.num_tokens == 1 and not request.finished:
            return [(request.front_end, self._end(request, Tokens(request.id, finish_reason="error", error=cause)))]
        self._caution.tighten(failed.num_tokens, len(failed.slices))
        logger.warning(
            "a step of %d requests and %d tokens is tried again with at most %d and %d: %s",
            len(failed.slices),
            failed.num_tokens,
            self._caution.max_requests,
            self._caution.max_tokens,
            cause,
        )
        return []
