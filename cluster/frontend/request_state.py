"""A request's state in the front end: the core's tokens become text, log-probabilities and a finish reason."""

import time
from dataclasses import dataclass, field

from eagleray.cluster.core.messages import EngineRequest, Tokens
from eagleray.cluster.core.time_accounting import Begun, Spent
from eagleray.cluster.frontend.detokenizer import Detokenizer
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import (
    NO_TOKEN_LEFT,
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputKind,
    RequestParts,
)
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.workers.protocol.messages import TokenLogprobs

Logprobs = dict[int, Logprob]


@dataclass(slots=True, kw_only=True, eq=False)
class Completion:
    """One sequence of a request."""

    index: int
    id: int  # by which the engine knows it
    detokenizer: Detokenizer | None  # None where no text is wanted
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    error_code: str | None = None
    begun: Begun | None = None
    num_told: int = 0  # tokens that an output of kind DELTA has had
    num_characters_told: int = 0
    shown: list[CompletionOutput] | None = None  # while nothing is new

    def apply(self, news: Tokens, generation: "RequestState", eos_token_ids: frozenset[int]) -> None:
        """Add tokens up to the one that completes a stop string; see to the end if this is it."""
        self.shown = None
        params = generation.params
        drawn_stop = news.finish_reason == "stop"
        for position, token_id in enumerate(news.token_ids):
            self.token_ids.append(token_id)
            if news.logprobs:
                self.logprobs.append(generation.named(news.logprobs[position]))
                self.cumulative_logprob += news.logprobs[position].logprobs[0]
            is_stop_token = drawn_stop and position == len(news.token_ids) - 1
            if self.detokenizer is None or (is_stop_token and not params.include_stop_str_in_output):
                continue
            stop = self.detokenizer.push(token_id, may_stop=len(self.token_ids) > params.min_tokens)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return
        if news.finish_reason is not None:
            self.end(news.finish_reason, news.error)
            self.error_code = NO_TOKEN_LEFT if news.all_masked else None
            if drawn_stop and (params.ignore_eos or self.token_ids[-1] not in eos_token_ids):
                self.stop_reason = self.token_ids[-1]

    def end(self, reason: str, error: str | None = None) -> None:
        """End without a stop string."""
        self.shown = None
        self.finish_reason, self.error = reason, error
        if self.detokenizer is not None:
            self.detokenizer.flush()


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One request and its `n` sequences, of which one is run if all are equal."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    request: EngineRequest  # what the engine is to be sent
    completions: list[Completion]
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of the prompt's second token and later ones
    num_cached_tokens: int | None = None
    arrival_time: float = field(default_factory=time.monotonic)
    first_token_time: float | None = None
    finished_time: float | None = None
    parts: RequestParts | None = None  # once it has ended by itself
    changed: dict[int, Completion] = field(default_factory=dict)  # since the last output, by index

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return self.finished_time is not None

    @property
    def has_told(self) -> bool:
        """Whether an output of kind DELTA has had tokens."""
        return self.completions[0].num_told > 0

    def apply(self, completion: Completion, news: Tokens, eos_token_ids: frozenset[int], now: float) -> None:
        """News of one of `completions`, received at `now`."""
        completion.apply(news, self, eos_token_ids)
        self.changed[completion.index] = completion
        completion.begun = news.begun or completion.begun
        self.prompt_logprobs += news.prompt_logprobs
        if self.num_cached_tokens is None:
            self.num_cached_tokens = news.num_cached_tokens
        if news.token_ids and self.first_token_time is None:
            self.first_token_time = now
        if completion.finish_reason is not None:
            self._see_end(time.monotonic())

    def divide(self, last: Completion, spent: Spent, heard: float) -> None:
        """Say where its time went: the end of its `last` sequence was `heard` when the engine had `spent` that."""
        if last.begun is None or self.finished_time is None:
            return
        ran, queue = spent - last.begun.before, last.begun.queue
        detokenize = self.finished_time - heard
        known = queue + ran.schedule + ran.broadcast + ran.gpu + detokenize
        channel = self.finished_time - self.arrival_time - known
        self.parts = RequestParts(queue, ran.schedule, ran.broadcast, ran.gpu, detokenize, channel)

    def end(self, reason: str) -> None:
        """End every sequence that runs."""
        for completion in self.completions:
            if completion.finish_reason is None:
                completion.end(reason)
                self.changed[completion.index] = completion
        self._see_end(time.monotonic())

    @property
    def failed(self) -> bool:
        """Whether a sequence has ended with an error."""
        return any(completion.error is not None for completion in self.completions)

    def output(self) -> RequestOutput:
        """All that is known by now, or what is new, as `output_kind` says. Long lists are not copied before read."""
        if self.output_kind is RequestOutputKind.DELTA and self.params.prompt_logprobs is None:
            return RequestOutput(
                self.request_id,
                self.prompt,
                self.prompt_token_ids,
                None,
                self._deltas(),
                self.finished_time is not None,
                self.num_cached_tokens,
                RequestMetrics(self.arrival_time, self.first_token_time, self.finished_time, self.parts),
            )
        told, num_told = self.prompt_logprobs, len(self.prompt_logprobs)
        wanted = self.params.prompt_logprobs is not None
        output: RequestOutput = RequestOutput.made_lazily(
            {"prompt_logprobs": lambda: [None, *map(self.named, told[:num_told])] if wanted else None},
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=self._deltas() if self.output_kind is RequestOutputKind.DELTA else self._all(),
            finished=self.finished,
            num_cached_tokens=self.num_cached_tokens,
            metrics=RequestMetrics(self.arrival_time, self.first_token_time, self.finished_time, self.parts),
        )
        return output

    def named(self, entry: TokenLogprobs) -> Logprobs:
        """The token itself with its rank, then the most likely ones, whose ranks count from 1."""
        ranks = (entry.rank, *range(1, len(entry.token_ids)))
        return {
            token_id: Logprob(logprob, rank, self._decoded(token_id))
            for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, ranks, strict=True)
        }

    def _decoded(self, token_id: int) -> str | None:
        if self.tokenizer is None or not self.params.detokenize:
            return None
        return self.tokenizer.text_of(token_id)

    def _see_end(self, now: float) -> None:
        if self.finished_time is None and all(completion.finish_reason for completion in self.completions):
            self.finished_time = now

    def _all(self) -> list[CompletionOutput]:
        for completion in self.completions:
            if completion.shown is None:
                completion.shown = self._completion_outputs(completion)
        return [output for completion in self.completions for output in completion.shown or ()]

    def _deltas(self) -> list[CompletionOutput]:
        changed, self.changed = self.changed, {}
        return [output for completion in changed.values() for output in self._delta(completion)]

    def _delta(self, completion: Completion) -> list[CompletionOutput]:
        """What is new, made at once: it is short, and will be read. One for each sequence that it stands for."""
        text, wanted = "", self.params.logprobs is not None
        if completion.detokenizer is not None:
            text = completion.detokenizer.text_since(completion.num_characters_told)
            completion.num_characters_told = completion.detokenizer.num_characters
        token_ids, completion.num_told = completion.token_ids[completion.num_told :], len(completion.token_ids)
        logprobs, completion.logprobs = completion.logprobs, []
        return [
            CompletionOutput(
                completion.index + copy,
                text,
                token_ids if copy == 0 else token_ids[:],  # lists of its own, which callers may change
                completion.cumulative_logprob if wanted else None,
                (logprobs if copy == 0 else logprobs[:]) if wanted else None,
                completion.finish_reason,
                completion.stop_reason,
                completion.error,
                completion.error_code,
            )
            for copy in range(self.params.n // self.params.num_distinct)
        ]

    def _completion_outputs(self, completion: Completion) -> list[CompletionOutput]:
        """All of it so far. One for each sequence that it stands for: all if they are equal."""
        num_equal = self.params.n // self.params.num_distinct
        return [self._completion_output(completion, completion.index + copy) for copy in range(num_equal)]

    def _completion_output(self, completion: Completion, index: int) -> CompletionOutput:
        """The lists only grow, so that their beginnings can be copied later."""
        token_ids, end, logprobs = completion.token_ids, len(completion.token_ids), completion.logprobs
        num_logprobs, wanted = len(logprobs), self.params.logprobs is not None
        output: CompletionOutput = CompletionOutput.made_lazily(
            {
                "text": _no_text if completion.detokenizer is None else completion.detokenizer.shown(),
                "token_ids": lambda: token_ids[:end],
                "logprobs": lambda: logprobs[:num_logprobs] if wanted else None,
            },
            index=index,
            cumulative_logprob=completion.cumulative_logprob if wanted else None,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            error=completion.error,
            error_code=completion.error_code,
        )
        return output


def _no_text() -> str:
    return ""
