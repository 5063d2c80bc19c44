"""A sequence's state in the engine core: its tokens, its blocks, and how far the ranks have computed it."""

import time
from array import array
from dataclasses import dataclass, field

import msgspec

from eagleray.cluster.core.fairness import Group
from eagleray.cluster.core.kv_cache_manager import Blocks
from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.core.prompt_lookup import PromptLookup
from eagleray.cluster.core.time_accounting import NOTHING, Begun, Spent, TimeAccounting
from eagleray.workers.protocol.messages import RowStart, Sampling, TokenLogprobs

FrontEndId = bytes


@dataclass(slots=True, eq=False)
class Request:
    """State that outlives any rank. A token is committed once its step's output has reached the engine core."""

    front_end: FrontEndId
    id: int
    arrival: int  # counts up
    group: Group
    sampling: Sampling
    max_tokens: int
    num_prompt_tokens: int
    token_ids: "array[int]"  # prompt and committed tokens
    num_known_tokens: int  # those, and the ones sampled by steps in flight
    max_computed_tokens: int  # the last token of the longest output is never run
    stop_token_ids: frozenset[int]
    num_listed: int  # numbers of its sampling's lists, which ranks are told with its row

    row: int | None = None  # None while it waits
    blocks: list[Blocks] = field(default_factory=list)  # one for each KV group
    num_held_tokens: int = 0  # for which these are enough
    num_to_publish: int = 0  # as many committed tokens fill another block
    num_computed_tokens: int = 0  # tokens whose KV is written once the steps in flight are done
    quiet_until: int = 0  # a decode from a position before this needs no block and is not the last
    is_finite: bool = True  # False once its logits were NaN or infinite, hence also what its blocks hold
    num_cached_tokens: int | None = None  # prompt tokens found in the prefix cache at the first start
    num_prompt_logprobs: int = 0  # delivered
    waits_since: float | None = field(default_factory=time.monotonic)  # None once its first step is done
    queued_s: float = 0.0  # in earlier waits
    ran: Spent = NOTHING  # before it was preempted
    begun: Begun | None = None
    finished: bool = False
    lookup: PromptLookup | None = None  # where drafts come from, with speculation
    num_drafted: int = 0  # tokens of the draft in flight
    was_drafted: bool = False  # ranks do not know how many tokens it has since its last draft
    shares_prompt: bool = False  # `token_ids` and the hashes of `blocks` are other sequences', too

    @classmethod
    def sequences(
        cls, front_end: FrontEndId, asked: EngineRequest, arrival: int, group: Group, blocks: list[Blocks]
    ) -> "list[Request]":
        """All that were asked for together, the first of which has this `arrival`. They share what they begin with.

        `blocks` are those of a new request.
        """
        token_ids = array("i", asked.prompt_token_ids)
        stop_token_ids, num_listed = frozenset(asked.sampling.stop_token_ids), asked.sampling.num_listed
        further = msgspec.structs.replace(asked.sampling, prompt_logprobs=None)
        samplings = [asked.sampling, *(msgspec.structs.replace(further, seed=seed) for seed in asked.seeds)]
        return [
            cls(
                front_end=front_end,
                id=asked.id + index,
                arrival=arrival + index,
                group=group,
                sampling=sampling,
                max_tokens=asked.max_tokens,
                num_prompt_tokens=len(token_ids),
                token_ids=token_ids,
                num_known_tokens=len(token_ids),
                max_computed_tokens=len(token_ids) + asked.max_tokens - 1,
                stop_token_ids=stop_token_ids,
                num_listed=num_listed,
                blocks=[Blocks(hashes=each.hashes) for each in blocks],
                shares_prompt=bool(asked.seeds),
            )
            for index, sampling in enumerate(samplings)
        ]

    def leave_prompt(self) -> None:
        """It is to run: from now on its tokens and their hashes are its own."""
        if self.shares_prompt:
            self.shares_prompt = False
            self.token_ids = self.token_ids[:]
            self.blocks = [Blocks(hashes=each.hashes.copy()) for each in self.blocks]

    @property
    def num_runnable_tokens(self) -> int:
        """How many tokens the ranks could run now."""
        return min(self.num_known_tokens, self.max_computed_tokens) - self.num_computed_tokens

    @property
    def awaits_tokens(self) -> bool:
        """Whether a step in flight is still sampling for this request."""
        return self.num_known_tokens > len(self.token_ids)

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether prompt log-probabilities are still owed."""
        return self.sampling.prompt_logprobs is not None and self.num_prompt_logprobs < self.num_prompt_tokens - 1

    def commit(self, token_id: int) -> str | None:
        """Append a sampled token; return the reason if the request ends with it."""
        self.token_ids.append(token_id)
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if len(self.token_ids) > self.max_computed_tokens else None

    def begin(self, began: float, before: Spent) -> Begun:
        """Its first step is done, whose window `began` when the engine had spent what it had `before`."""
        assert self.waits_since is not None
        self.queued_s += max(0.0, began - self.waits_since)
        self.waits_since = None
        self.begun = Begun(self.queued_s, before - self.ran)
        return self.begun

    def wait_again(self, clock: TimeAccounting) -> None:
        """It was preempted: until its next first step is done, time goes to the queue."""
        if self.waits_since is None:
            assert self.begun is not None
            self.waits_since, self.ran = clock.time, clock.spent - self.begun.before

    def take_prompt_logprobs(self, start: int, logprobs: list[TokenLogprobs]) -> list[TokenLogprobs]:
        """Those not delivered yet, of `logprobs` that begin at prompt token `start + 1`.

        A preempted request computes some of them twice.
        """
        owed = logprobs[self.num_prompt_logprobs - start :]
        self.num_prompt_logprobs += len(owed)
        return owed

    def row_start(self) -> RowStart:
        """What the ranks are told when a row becomes this request's."""
        sampling = self.sampling
        if sampling.prompt_logprobs is not None and not self.wants_prompt_logprobs:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        assert self.row is not None
        return RowStart(
            row=self.row,
            token_ids=self.token_ids.tobytes(),
            num_prompt_tokens=self.num_prompt_tokens,
            block_ids=self.blocks[0].ids.copy(),
            sampling=sampling,
            num_computed_tokens=self.num_computed_tokens,
        )
