"""The figures a benchmark reports, computed from the times at which requests were due and their tokens arrived."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTS = (50, 90, 95, 99)
LIMITABLE = {"ttft": "time_to_first_token", "tpot": "time_per_output_token", "e2el": "latency"}  # vLLM's short names


@dataclass(slots=True, kw_only=True)
class RequestTimes:
    """One request's story, in seconds on one clock."""

    due: float  # when it was to be sent: a sender that lags behind makes a request late, and not faster
    num_input_tokens: int
    tokens: list[float] = field(default_factory=list)  # when each output token came
    error: str | None = None  # why it failed

    @property
    def time_to_first_token(self) -> float | None:
        """TTFT; None before the first token."""
        return self.tokens[0] - self.due if self.tokens else None

    @property
    def latency(self) -> float | None:
        """End to end."""
        return self.tokens[-1] - self.due if self.tokens else None

    @property
    def time_per_output_token(self) -> float | None:
        """TPOT: the mean interval after the first token; None with fewer than two."""
        intervals = len(self.tokens) - 1
        return (self.tokens[-1] - self.tokens[0]) / intervals if intervals > 0 else None

    @property
    def inter_token_latencies(self) -> list[float]:
        """ITL: every interval after the first token."""
        return [later - earlier for earlier, later in zip(self.tokens, self.tokens[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles, the latter interpolated linearly."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


def spread(values: Sequence[float]) -> Spread | None:
    """None for no values."""
    if not values:
        return None
    return Spread(float(np.mean(values)), *(float(value) for value in np.percentile(values, PERCENTS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingFigures:
    """What many requests together saw. Rates are per second from the first due time to the last token."""

    num_requests: int
    num_failed: int
    duration_s: float
    num_input_tokens: int  # of requests that did not fail, as all that follows
    num_output_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    goodput_requests_per_s: float | None  # of those within every limit; None without limits
    time_to_first_token_s: Spread | None
    time_per_output_token_s: Spread | None
    inter_token_latency_s: Spread | None
    latency_s: Spread | None


def serving_figures(requests: Iterable[RequestTimes], limits: Mapping[str, float] | None = None) -> ServingFigures:
    """Figures of requests that have ended. `limits` are `is_good`'s."""
    everything = list(requests)
    ended = [request for request in everything if request.error is None and request.tokens]
    duration = max((r.tokens[-1] for r in ended), default=0.0) - min((r.due for r in everything), default=0.0)
    duration = max(duration, 1e-9)
    num_input = sum(request.num_input_tokens for request in ended)
    num_output = sum(len(request.tokens) for request in ended)
    return ServingFigures(
        num_requests=len(everything),
        num_failed=len(everything) - len(ended),
        duration_s=duration,
        num_input_tokens=num_input,
        num_output_tokens=num_output,
        requests_per_s=len(ended) / duration,
        input_tokens_per_s=num_input / duration,
        output_tokens_per_s=num_output / duration,
        total_tokens_per_s=(num_input + num_output) / duration,
        goodput_requests_per_s=sum(is_good(r, limits) for r in ended) / duration if limits else None,
        time_to_first_token_s=spread([t for r in ended if (t := r.time_to_first_token) is not None]),
        time_per_output_token_s=spread([t for r in ended if (t := r.time_per_output_token) is not None]),
        inter_token_latency_s=spread([t for r in ended for t in r.inter_token_latencies]),
        latency_s=spread([t for r in ended if (t := r.latency) is not None]),
    )


def is_good(request: RequestTimes, limits: Mapping[str, float]) -> bool:
    """Whether a request kept every limit: seconds, by the names in `LIMITABLE`. One token has no TPOT to miss."""
    taken = {name: getattr(request, attribute) for name, attribute in LIMITABLE.items()}
    return request.error is None and all(taken[name] is None or taken[name] <= most for name, most in limits.items())


def decode_time(latency: float, latency_of_one: float, output_len: int) -> float | None:
    """Seconds per output token after the first, from a batch's latency with `output_len` tokens and with one."""
    return (latency - latency_of_one) / (output_len - 1) if output_len > 1 else None
