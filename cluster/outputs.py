"""`RequestOutput` and its parts: what callers get back, under vLLM's names."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

NO_TOKEN_LEFT = "no_token_left"  # the code of an error that is the request's own


class RequestOutputKind(Enum):
    """What the outputs of a request hold."""

    CUMULATIVE = 0  # all that there is by then
    DELTA = 1  # what is new since the last output, of the sequences that have news
    FINAL_ONLY = 2  # all, once: at the end, or when a sequence fails


class LazyFields:
    """Fields that are made when they are first read: outputs come with every token, and long lists take long."""

    __slots__ = ("_lazy",)

    def __getattr__(self, name: str) -> Any:
        """Make a field that has no value yet."""
        later: dict[str, Callable[[], Any]] = object.__getattribute__(self, "_lazy")
        if name not in later:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value := later[name]())
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        """What is pickled is an output with all of its fields made."""
        return type(self), tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @classmethod
    def made_lazily(cls, later: dict[str, Callable[[], Any]], **fields: Any) -> Any:
        """One whose other `fields` are there already."""
        made = cls.__new__(cls)
        for name, value in fields.items():
            object.__setattr__(made, name, value)
        object.__setattr__(made, "_lazy", later)
        return made


class Logprob(msgspec.Struct, frozen=True, gc=False):
    """One token's natural log-probability at one position. There are many: a struct is made faster than a dataclass."""

    logprob: float
    rank: int  # 1 is the most likely token of the vocabulary
    decoded_token: str | None  # None without a tokenizer


@dataclass(slots=True)
class CompletionOutput(LazyFields):
    """One sequence so far."""

    index: int  # 0 up to n - 1
    text: str
    token_ids: list[int]  # the stop token included, which `text` leaves out
    cumulative_logprob: float | None  # of the sampled tokens, when logprobs are asked for
    logprobs: list[dict[int, Logprob]] | None  # of each token: the sampled one first, then the most likely ones
    finish_reason: str | None = None  # stop, length, abort or error; None while it runs
    stop_reason: int | str | None = None  # the stop token or stop string; None for the end of sequence
    error: str | None = None  # the cause, when finish_reason is error
    error_code: str | None = None  # NO_TOKEN_LEFT where the request's own parameters left no token to draw


@dataclass(frozen=True, slots=True)
class RequestParts:
    """Where the time from a request's arrival to its end went, in seconds; of several sequences the last one's.

    Of what happens at once only one counts, so that the parts add up. What the ranks compute comes first: the work of
    engine core and front end counts where it is not hidden behind them.
    """

    queue: float  # waiting in the engine, until the ranks are free for its first step; again after a preemption
    schedule: float  # the engine core's work on steps
    broadcast: float  # steps and their outputs on the way between core and ranks, until they are read
    gpu: float  # from the launch of steps to their outputs
    detokenize: float  # the last tokens into text
    channel: float  # all the rest: messages between front end and engine core, both ways, until they are read


@dataclass(slots=True)
class RequestMetrics:
    """When each stage was reached, in seconds of `time.monotonic()`."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    parts: RequestParts | None = None  # of a request that has ended by itself

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput(LazyFields):
    """One request so far: cumulative, so that the last one says everything, unless `output_kind` says otherwise."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # None for the first token, which nothing predicts
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int | None  # prompt tokens found in the prefix cache; None before the first news
    metrics: RequestMetrics
