"""The line of figures that ends a run."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from eagleray.cluster.errors import counted
from eagleray.cluster.outputs import RequestOutput


@dataclass(frozen=True)
class Figures:
    """What a run did. Times in seconds, from the moment a request was submitted."""

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    elapsed: float
    first_token: Sequence[float]  # of each request that had one
    per_output_token: Sequence[float]  # after the first, of each request that finished with two or more

    @classmethod
    def of(cls, outputs: Iterable[RequestOutput], elapsed: float) -> "Figures":
        """Figures of each request's last output."""
        outputs = list(outputs)
        return cls(
            num_requests=len(outputs),
            num_prompt_tokens=sum(len(output.prompt_token_ids) for output in outputs),
            num_output_tokens=sum(num_output_tokens(output) for output in outputs),
            elapsed=elapsed,
            first_token=[t for output in outputs if (t := output.metrics.time_to_first_token) is not None],
            per_output_token=[t for output in outputs if (t := time_per_output_token(output)) is not None],
        )

    def line(self) -> str:
        """All of it in one line."""
        parts = [
            counted(self.num_requests, "request"),
            f"{self.num_prompt_tokens} prompt + {counted(self.num_output_tokens, 'output token')} "
            f"in {self.elapsed:.1f} s",
            f"{self.num_output_tokens / max(self.elapsed, 1e-9):.1f} tokens/s",
        ]
        if self.first_token:
            p50, p99 = median(self.first_token), percentile(self.first_token, 99)
            parts.append(f"first token {_ms(p50)} median, {_ms(p99)} p99")
        if self.per_output_token:
            parts.append(f"{_ms(median(self.per_output_token))} per output token")
        return " · ".join(parts)


def num_output_tokens(output: RequestOutput) -> int:
    """Over all of the request's sequences."""
    return sum(len(sequence.token_ids) for sequence in output.outputs)


def time_per_output_token(output: RequestOutput) -> float | None:
    """Seconds between tokens of the longest sequence; None with fewer than two tokens or before the end."""
    intervals = max((len(sequence.token_ids) for sequence in output.outputs), default=0) - 1
    first, last = output.metrics.first_token_time, output.metrics.finished_time
    return (last - first) / intervals if first is not None and last is not None and intervals > 0 else None


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of all values do not exceed."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
