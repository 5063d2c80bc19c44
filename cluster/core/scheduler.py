"""The scheduler: decides which tokens of which requests the next step runs. There are no phases: a chunk of a prompt
and a decode of one token are both tokens of a request.
"""

import heapq
import logging
import time
from array import array
from collections import deque
from dataclasses import replace
from operator import attrgetter, itemgetter

from eagleray.cluster.core.fairness import Fairness, Group, scheduling_key
from eagleray.cluster.core.kv_cache_manager import KVCacheManager, KVGroup, Prefix
from eagleray.cluster.core.messages import EngineRequest, EngineStats, Tokens
from eagleray.cluster.core.oom_backoff import OomBackoff
from eagleray.cluster.core.prompt_lookup import PromptLookup
from eagleray.cluster.core.request import FrontEndId, Request
from eagleray.cluster.core.speculation import Speculation
from eagleray.cluster.core.step_forecast import StepForecast, lead
from eagleray.cluster.core.step_plan import InFlight, StepPlan
from eagleray.cluster.core.time_accounting import TimeAccounting
from eagleray.cluster.errors import ALL_MASKED
from eagleray.workers.protocol.messages import Step, StepOutput

logger = logging.getLogger(__name__)

News = tuple[FrontEndId, Tokens]
NOT_FINITE = (
    "the model's logits for this request are NaN or infinite, so no token can be drawn; its weights or its precision "
    "do not stand this prompt: try a dtype with a wider range (bfloat16 or float32), or check the checkpoint"
)
MANY_STEPS = 8  # mixed steps' worth of prompts: where more is to be run, throughput comes first
MAX_TOLD = 2**20  # tokens of requests that ranks are told in one step, beside those of the last: 4 MiB


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
        mixed_step_tokens: int | None = None,
        max_chunk_tokens: int | None = None,
        enable_prefix_caching: bool = True,
        num_speculative_tokens: int = 0,
    ) -> None:
        """A step in which requests decode runs no more than `mixed_step_tokens`, unless many more are to be run.

        With `num_speculative_tokens`, drafts of up to so many tokens run with the last token of a request. All drafts
        of a step together have fewer tokens than there are free rows.
        """
        self.kv_cache = KVCacheManager([KVGroup(num_blocks, block_size)], enable_prefix_caching=enable_prefix_caching)
        self.clock = TimeAccounting()
        self._oom_backoff = OomBackoff(max_num_batched_tokens, max_num_seqs)
        self._mixed_step_tokens = mixed_step_tokens or max_num_batched_tokens
        self._max_chunk_tokens = max_chunk_tokens or max_num_batched_tokens
        self._free_rows = list(range(max_num_seqs))  # a heap: low rows first keeps batches dense
        self._stopped_rows: list[int] = []  # not told to the ranks yet
        self._requests: dict[tuple[FrontEndId, int], Request] = {}
        self._fairness = Fairness()  # who waits, and who holds how much
        self._running: list[Request] = []
        self._in_flight: deque[InFlight] = deque()
        self._untold: dict[tuple[FrontEndId, int], Request] = {}  # that began and had no news since
        self._restart = False  # the next step is the first after one that ran out of memory
        self._num_steps = 0
        self._num_arrived = 0
        self._num_preemptions = 0
        self._num_prefix_hit_tokens = 0
        self._speculation = Speculation(num_speculative_tokens)
        self._forecast = StepForecast()

    @property
    def num_in_flight(self) -> int:
        """Steps scheduled and not yet updated."""
        return len(self._in_flight)

    @property
    def due(self) -> float:
        """As of `time.monotonic()`, when the next step is to be scheduled, or else the ranks may soon be idle.

        Those in flight will keep them busy for a while at least; 0 without any.
        """
        if not self._in_flight:
            return 0.0
        busy = sum(self._forecast.at_least(due.num_tokens) for due in self._in_flight)
        return self.clock.time + busy - lead(min(self._fairness.num_waiting_tokens, MAX_TOLD))

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
            num_waiting=self._fairness.num_waiting,
            num_used_blocks=self.kv_cache.num_used,
            num_blocks=self.kv_cache.num_blocks,
            num_preemptions=self._num_preemptions,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
            num_draft_tokens=self._speculation.num_draft_tokens,
            num_accepted_tokens=self._speculation.num_accepted_tokens,
            spent=self.clock.spent,
        )

    # ---- requests come and go

    def add(self, front_end: FrontEndId, asked: EngineRequest) -> None:
        """Accept a request. Raises `ValueError` if an id of it is in use or it could never fit the KV cache."""
        group = self._fairness.group(
            (front_end, asked.tenant), asked.group or asked.id, asked.priority, self._num_arrived
        )
        requests = Request.sequences(front_end, asked, self._num_arrived, group, self.kv_cache.new_blocks())
        if taken := [request.id for request in requests if (front_end, request.id) in self._requests]:
            raise ValueError(f"request id {taken[0]} is already in use; give every request of a front end its own")
        capacity = self.kv_cache.num_tokens
        if requests[0].num_prompt_tokens + asked.max_tokens - 1 > capacity:
            raise ValueError(
                f"the prompt has {requests[0].num_prompt_tokens} tokens and max_tokens is {asked.max_tokens}, but the "
                f"KV cache holds {capacity} tokens; shorten one of them or give the KV cache more memory"
            )
        self._num_arrived += len(requests)
        for request in requests:
            self._requests[front_end, request.id] = request
            request.lookup = self._speculation.new_lookup()
            self._fairness.wait(request)

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
        self.kv_cache.forget_prefixes()
        return news

    def _end(self, request: Request, news: Tokens) -> Tokens:
        request.finished = True
        self._oom_backoff.note_end()
        del self._requests[request.front_end, request.id]
        if request.row is None:
            self._fairness.leave(request)
        else:
            self._vacate(request)
            self._fairness.give_row_back(request, waits_again=False)
        return news

    def _vacate(self, request: Request) -> None:
        """Take a running request's row and blocks away; what is in flight for it still runs, and harms nothing."""
        assert request.row is not None
        self._running.remove(request)
        self._publish(request)
        self.kv_cache.release(request)
        heapq.heappush(self._free_rows, request.row)
        self._stopped_rows.append(request.row)
        request.row = None
        request.num_computed_tokens = request.quiet_until = request.num_drafted = 0
        request.was_drafted = False

    # ---- a step is made

    def schedule(self) -> Step | None:
        """Fill the token budget: a token for every row first, then what else there is. None if nothing can run now."""
        begin = time.monotonic()
        max_tokens = self._oom_backoff.max_tokens
        # Ranks draw for as many places as they have rows: drafts have those of rows that nobody takes in this step.
        plan = StepPlan(max_tokens, max(0, len(self._free_rows) - self._fairness.num_waiting))
        if self.kv_cache.is_tight(len(self._running)):
            self._make_room(plan)
        if self._fairness.num_waiting and not plan.preempted:
            self._make_way()
        with_more = self._continue_running(plan)
        if with_more or self._fairness.num_waiting:
            withheld = self._withhold(with_more, plan)
            plan.budget -= withheld
            self._share(with_more, plan)
            plan.budget += withheld
        if not plan.chunks:
            if not self._in_flight:
                self.clock.stop()
            return None
        plan.chunks.sort(key=itemgetter(1))
        self._num_steps += 1
        self._in_flight.append(InFlight(self._num_steps, plan.chunks, max_tokens - plan.budget, plan.started))
        self.clock.start(begin)
        stopped, self._stopped_rows = self._stopped_rows, []
        if len(plan.chunks) < len(self._running):
            plan.rest(self._running)
        restart, self._restart = self._restart, False
        return Step(
            self._num_steps, stopped, plan.starts, plan.blocks, plan.uneven, plan.drafts, plan.num_tokens, restart
        )

    def _make_room(self, plan: StepPlan) -> None:
        """See to it that the next token of every row finds a block: who holds most gives up a row and its blocks."""
        while not self.kv_cache.fits_next_tokens(each for each in self._running if each.num_runnable_tokens > 0):
            plan.preempted = True
            self._preempt(max(self._running, key=scheduling_key))

    def _make_way(self) -> None:
        """Let who holds far more than one that waits give up a row, where nothing is free."""
        rich = self._fairness.over_share()
        if rich is None:
            return
        request = self._fairness.first()
        assert request is not None
        if not (request.awaits_tokens or (self._has_rows() and self._start(request, self._oom_backoff.max_tokens))):
            self._preempt(max((each for each in self._running if each.group is rich), key=attrgetter("arrival")))

    def _continue_running(self, plan: StepPlan) -> list[Request]:
        """Run a token of every row that has no more; those that have more are returned.

        Most decode, with nothing to look after until `quiet_until`: those are done at once.
        """
        add = plan.chunks.append
        num_quiet = 0
        with_more = []
        for request in self._running:
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
            num_tokens = request.num_runnable_tokens
            if num_tokens == 1 and request.lookup is not None:
                self._speculate(request, request.lookup, plan, num_quiet)
            elif num_tokens == 1:
                self._grow_and_run(request, 1, plan)
            elif num_tokens > 1:
                with_more.append(request)
        plan.budget -= num_quiet
        return with_more

    def _speculate(self, request: Request, lookup: PromptLookup, plan: StepPlan, num_quiet: int) -> None:
        """Run a request's last token and a draft of what follows, or wait for the token in flight if one is due."""
        if request.awaits_tokens:
            if not lookup.is_due(request.token_ids):
                self._grow_and_run(request, 1, plan)
            return
        draft = self._speculation.draft(request, lookup, plan.budget - num_quiet - len(self._running), plan)
        if num_tokens := self._grow(request, 1 + len(draft), plan):
            self._run(request, 1, plan)
            if num_tokens > 1:
                self._speculation.run(request, draft[: num_tokens - 1], plan)

    def _withhold(self, with_more: list[Request], plan: StepPlan) -> int:
        """How much of the budget prompts leave, for the sake of requests that decode: each waits for the whole step.

        They keep half of a mixed step at least. Where more than `MANY_STEPS` such steps' worth of prompts wait or run,
        they leave nothing.
        """
        used = self._oom_backoff.max_tokens - plan.budget
        left = max(self._mixed_step_tokens - used, self._mixed_step_tokens // 2, 1)
        if used == 0 or left >= plan.budget:
            return 0
        to_run = self._fairness.num_waiting_tokens + sum(request.num_runnable_tokens for request in with_more)
        return plan.budget - left if to_run <= MANY_STEPS * self._mixed_step_tokens else 0

    def _share(self, with_more: list[Request], plan: StepPlan) -> None:
        """Share what single tokens left of the budget among long chunks and newcomers.

        Half is for who stands first, so that every prompt comes to its end. Newcomers have the other half, and what
        they leave goes to the chunks that need least: so nobody waits for the end of a prompt that is much longer than
        his own. A group's next request begins when the last has run all of its tokens, to find them in the cache.
        """
        newcomers = self._fairness.num_waiting > 0 and self._has_rows() and not plan.preempted
        for_others = plan.budget // 2 if newcomers or len(with_more) > 1 else 0
        cut: list[Request] = []
        for request in sorted(with_more, key=scheduling_key):
            num_tokens = self._longest_chunk(request)
            if not cut and num_tokens <= plan.budget - for_others:
                self._grow_and_run(request, num_tokens, plan)
            else:
                cut.append(request)
        kept = plan.budget - for_others if cut else 0
        if newcomers:
            self._admit_waiting(plan, kept, {request.group for request in cut})
        for request in sorted(cut[1:], key=lambda each: (each.group.priority, each.num_runnable_tokens)):
            self._grow_and_run(request, min(self._longest_chunk(request), plan.budget - kept), plan)
        for request in cut[:1]:
            self._grow_and_run(request, min(self._longest_chunk(request), plan.budget), plan)
        if newcomers and cut:
            self._admit_waiting(plan, 0, set())

    def _longest_chunk(self, request: Request) -> int:
        return min(request.num_runnable_tokens, self._max_chunk_tokens)

    def _grow_and_run(self, request: Request, num_tokens: int, plan: StepPlan) -> None:
        """Run so many tokens of a running request, or as many as find blocks."""
        if num_tokens := self._grow(request, num_tokens, plan):
            self._run(request, num_tokens, plan)

    def _grow(self, request: Request, num_tokens: int, plan: StepPlan) -> int:
        """For how many of a running request's next tokens there are blocks, which it has then."""
        num_tokens, blocks = self.kv_cache.grow(request, num_tokens)
        if blocks is not None:
            assert request.row is not None
            plan.blocks[request.row] = blocks[0]
        return num_tokens

    def _preempt(self, request: Request) -> None:
        """Let a request wait again; its prompt and committed tokens are computed anew later."""
        self._vacate(request)
        self._fairness.give_row_back(request, waits_again=True)
        self._num_preemptions += 1
        request.wait_again(self.clock)

    def _run(self, request: Request, num_tokens: int, plan: StepPlan) -> None:
        row, start = request.row, request.num_computed_tokens
        assert row is not None
        request.num_computed_tokens = end = start + num_tokens
        if request.lookup is None:
            request.quiet_until = min(request.num_held_tokens, request.max_computed_tokens)
        samples = end == request.num_known_tokens
        request.num_known_tokens += samples
        plan.budget -= num_tokens
        plan.chunks.append((request, row, start, samples))
        if num_tokens != 1:
            plan.uneven[row] = num_tokens
        self._publish(request)

    def _publish(self, request: Request) -> None:
        """Let full blocks of committed tokens be found by others."""
        if request.is_finite:
            self.kv_cache.publish(request)

    def _has_rows(self, count: int = 1) -> bool:
        return len(self._free_rows) >= count and len(self._running) + count <= self._oom_backoff.max_requests

    def _admit_waiting(self, plan: StepPlan, kept: int, apart_from: set[Group]) -> None:
        """Start requests while there are rows, blocks, and more of the budget than is `kept`."""
        while plan.budget > kept and self._has_rows() and plan.num_told < MAX_TOLD:
            request = self._fairness.first(apart_from)
            if request is None or request.awaits_tokens or not self._admit(request, plan, plan.budget - kept):
                break  # a preempted request waits for its tokens in flight; nobody overtakes
            plan.num_told += len(request.token_ids) + request.num_listed
            assert request.row is not None
            if not request.awaits_tokens and plan.uneven.get(request.row, 1) < self._max_chunk_tokens:
                apart_from.add(request.group)  # the budget ended its chunk

    def _admit(self, request: Request, plan: StepPlan, budget: int) -> bool:
        """Start a waiting request in a row if its first chunk finds blocks."""
        start = self._start(request, budget)
        if start is None:
            return False
        prefix, num_tokens = start
        self._fairness.take_row(request)
        self._running.append(request)
        request.leave_prompt()
        self.kv_cache.start(request, prefix, num_tokens)
        request.num_computed_tokens = prefix.num_tokens
        request.row = heapq.heappop(self._free_rows)
        plan.starts.append(request.row_start())
        plan.started.append(request)
        self._num_prefix_hit_tokens += prefix.num_tokens
        if request.num_cached_tokens is None:
            request.num_cached_tokens = prefix.num_tokens
        self._run(request, num_tokens, plan)
        return True

    def _start(self, request: Request, budget: int) -> tuple[Prefix, int] | None:
        """A waiting request's cached prefix and its first chunk; None if there are too few blocks for it.

        If others wait, too, one that no step could run whole has half of the budget.
        """
        prefix = self._find_prefix(request)
        num_left = request.num_runnable_tokens - prefix.num_tokens
        if num_left > self._oom_backoff.max_tokens and self._has_rows(2) and self._fairness.has_others(request.group):
            budget = (budget + 1) // 2
        num_tokens = min(num_left, self._max_chunk_tokens, budget)
        if not self.kv_cache.fits_start(prefix, num_tokens, keep_headroom=bool(self._running)):
            return None
        return prefix, num_tokens

    def _find_prefix(self, request: Request) -> Prefix:
        """What is cached of a request; nothing if it asks for log-probabilities of its prompt, which run with it."""
        return self.kv_cache.no_prefix() if request.wants_prompt_logprobs else self.kv_cache.match(request)

    # ---- a step is done

    def update(self, output: StepOutput) -> list[News]:
        """Commit what the oldest step in flight sampled. Tokens of requests that have ended meanwhile are dropped."""
        due = self._in_flight.popleft()
        assert due.step == output.step, f"step {output.step} returned while step {due.step} was due"
        self._end_window(due, output.gpu_seconds)
        if output.out_of_memory:
            return self._begin_anew(due, output.out_of_memory)
        if due.chunks:  # or else it was skipped
            self._forecast.learn(due.num_tokens, output.gpu_seconds)
        sampled = iter(array("i", output.token_ids))
        news: list[News] = []
        num_drawn, not_finite, all_masked = output.num_drawn, output.not_finite, output.all_masked
        logprobs, prompt_logprobs = output.logprobs, output.prompt_logprobs
        for request, row, start, samples in due.chunks:
            token_id = next(sampled) if samples else None
            further = None
            if num_drawn and row in num_drawn:
                further = [next(sampled) for _ in range(num_drawn[row] - 1)]
            if request.finished:
                continue
            if not_finite and row in not_finite:
                news.append((request.front_end, self._end_not_finite(request)))
                continue
            if all_masked and row in all_masked:
                tokens = Tokens(request.id, finish_reason="error", error=ALL_MASKED, all_masked=True)
                news.append((request.front_end, self._end(request, tokens)))
                continue
            tokens = Tokens(request.id)
            if prompt_logprobs and row in prompt_logprobs:
                tokens.prompt_logprobs = request.take_prompt_logprobs(start, prompt_logprobs[row])
            if token_id is not None:
                if logprobs and row in logprobs:
                    tokens.logprobs += logprobs[row]
                if further is None:
                    self._commit(request, token_id, tokens)
                else:
                    self._commit_drawn(request, row, start, [token_id, *further], tokens)
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

    def _commit_drawn(self, request: Request, row: int, start: int, token_ids: list[int], tokens: Tokens) -> None:
        """Commit what was drawn after a draft: those of its tokens that came true, and one more."""
        self._speculation.settle(request, row, start, len(token_ids), len(self._running))
        for token_id in token_ids:
            self._commit(request, token_id, tokens)
            if tokens.finish_reason:
                del tokens.logprobs[len(tokens.token_ids) :]
                break
        request.num_known_tokens = len(request.token_ids)

    def _end_not_finite(self, request: Request) -> Tokens:
        """Nothing can be drawn for it; what it has written since its prefix was found in the cache is offered no more.

        Ranks clean such blocks before they go to another request.
        """
        request.is_finite = False
        self.kv_cache.unpublish(request, request.num_cached_tokens or 0)
        return self._end(request, Tokens(request.id, finish_reason="error", error=NOT_FINITE))

    # ---- all begin anew

    def requeue_all(self, num_blocks: int) -> list[News]:
        """New ranks, whose `num_blocks` blocks hold nothing: all requests wait again, with their committed tokens.

        Outputs of the steps in flight are not expected any more. A request that does not fit now ends with an error.
        """
        self._in_flight.clear()
        self.clock.stop()
        self._go_back_to_committed_tokens()
        self._restart = False
        groups = [replace(group, num_blocks=num_blocks) for group in self.kv_cache.groups]
        self.kv_cache = KVCacheManager(groups, enable_prefix_caching=self.kv_cache.caches_prefixes)
        capacity = self.kv_cache.num_tokens
        cause = f"the KV cache holds {capacity} tokens since the engine started again, too few for this request"
        return [
            (request.front_end, self._end(request, Tokens(request.id, finish_reason="error", error=cause)))
            for request in list(self._requests.values())
            if request.max_computed_tokens > capacity
        ]

    def _go_back_to_committed_tokens(self) -> None:
        for request in sorted(self._running, key=attrgetter("arrival"), reverse=True):
            self._preempt(request)
        for request in self._requests.values():
            request.num_known_tokens = len(request.token_ids)
        self.kv_cache.forget_prefixes()  # some were to be written by steps that did not run
        self._stopped_rows.clear()

    def _begin_anew(self, failed: InFlight, cause: str) -> list[News]:
        """The step did not run, nor will those behind it: all requests go back to their committed tokens and wait.

        What runs next is smaller. A request whose single token does not fit by itself ends with an error.
        """
        for due in self._in_flight:
            due.chunks = []
        self._go_back_to_committed_tokens()
        self._restart = True
        request = failed.chunks[0][0]
        if failed.num_tokens == 1 and not request.finished:
            return [(request.front_end, self._end(request, Tokens(request.id, finish_reason="error", error=cause)))]
        self._oom_backoff.tighten(failed.num_tokens, len(failed.chunks))
        logger.warning(
            "a step of %d requests and %d tokens is tried again with at most %d and %d: %s",
            len(failed.chunks),
            failed.num_tokens,
            self._oom_backoff.max_requests,
            self._oom_backoff.max_tokens,
            cause,
        )
        return []
