"""The requests that a benchmark sends, and when, all determined by a seed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

WARM_UP_LEN = 32  # tokens


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of token counts around `mean`: fixed, or uniform, or log-normal.

    `range_ratio` r draws uniformly from `mean` x (1 - r) up to `mean` x (1 + r). `sigma` is the standard deviation of
    the logarithm, with a median of mean / exp(sigma² / 2); the long tail is cut at `draw`'s limit. Raises `ValueError`
    for parameters that do not make a distribution.
    """

    mean: int
    range_ratio: float = 0.0
    sigma: float = 0.0

    def __post_init__(self) -> None:
        if self.mean < 1:
            raise ValueError(f"a length of {self.mean} tokens cannot be run; give at least 1")
        if not 0 <= self.range_ratio < 1:
            raise ValueError(f"--range-ratio is {self.range_ratio:g}; give a share from 0 up to, but not including, 1")
        if not 0 <= self.sigma <= 3:
            raise ValueError(f"the sigma of a length is {self.sigma:g}; give 0 to 3")
        if self.range_ratio and self.sigma:
            raise ValueError("there is a --range-ratio and a sigma for the same length; give one of them")

    def draw(self, count: int, rng: np.random.Generator, limit: int) -> list[int]:
        """`count` lengths of at least 1; with a sigma, at most `limit`."""
        if self.sigma:
            drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
            return [int(length) for length in np.clip(np.rint(drawn), 1, limit)]
        low = max(1, round(self.mean * (1 - self.range_ratio)))
        high = max(low, round(self.mean * (1 + self.range_ratio)))
        return [int(length) for length in rng.integers(low, high, count, endpoint=True)]


def random_prompts(lengths: Sequence[int], vocab_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Prompts of these lengths, every token drawn on its own, so that they share no prefix."""
    return [rng.integers(0, vocab_size, length).tolist() for length in lengths]


def warm_up_lengths(prompts: Sequence[object]) -> list[int]:
    """The lengths of prompts that stand in for these: the same for token ids, and `WARM_UP_LEN` for a text."""
    return [len(prompt) if isinstance(prompt, list) else WARM_UP_LEN for prompt in prompts]


def due_times(count: int, rate: float, rng: np.random.Generator) -> list[float]:
    """When each request is to be sent, in seconds from the start: a Poisson process of `rate` per second.

    All at once if `rate` is infinite. Raises `ValueError` unless the rate is above 0.
    """
    if not rate > 0:
        raise ValueError(f"--request-rate is {rate:g}; give requests per second above 0, or inf for all at once")
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.exponential(1 / rate, count)
    return [float(due) for due in np.cumsum(gaps) - gaps[:1].sum()]  # the first is due at once
