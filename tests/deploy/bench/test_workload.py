"""What a benchmark sends: the distributions are those that were asked for, and a seed fixes them."""

import math

import numpy as np
import pytest

from eagleray.deploy.bench.workload import Lengths, due_times, random_prompts


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_lengths_are_fixed_by_default() -> None:
    assert Lengths(mean=70).draw(5, rng(), 50) == [70] * 5


def test_a_range_ratio_spreads_lengths_evenly_to_both_ends() -> None:
    drawn = Lengths(mean=100, range_ratio=0.2).draw(4000, rng(), 10)
    assert (min(drawn), max(drawn)) == (80, 120)
    assert np.mean(drawn) == pytest.approx(100, abs=1)  # three standard errors are 0.55


def test_log_normal_lengths_keep_their_mean_and_their_sigma() -> None:
    drawn = Lengths(mean=1000, sigma=0.5).draw(20_000, rng(), 10**9)
    assert np.mean(drawn) == pytest.approx(1000, rel=0.02)  # three standard errors are 1.1%
    assert np.std(np.log(drawn)) == pytest.approx(0.5, rel=0.03)


def test_a_long_tail_is_cut_at_the_limit() -> None:
    drawn = Lengths(mean=100, sigma=2.0).draw(1000, rng(), 300)
    assert (min(drawn), max(drawn)) == (1, 300)


def test_arrivals_are_poisson_and_begin_at_once() -> None:
    due = due_times(20_000, 50.0, rng())
    gaps = np.diff(due)
    assert due[0] == 0
    assert (gaps >= 0).all()
    assert np.mean(gaps) == pytest.approx(1 / 50, rel=0.03)
    assert np.std(gaps) == pytest.approx(1 / 50, rel=0.05), "an exponential's deviation is its mean"
    assert due_times(3, math.inf, rng()) == [0.0] * 3


def test_a_seed_fixes_everything() -> None:
    def workload(seed: int) -> object:
        generator = rng(seed)
        lengths = Lengths(mean=30, range_ratio=0.5).draw(9, generator, 100)
        return random_prompts(lengths, 1000, generator), due_times(9, 2.0, generator)

    assert workload(1) == workload(1) != workload(2)


def test_random_prompts_have_their_lengths_and_use_the_whole_vocabulary() -> None:
    prompts = random_prompts([1, 5, 2000], 40, rng())
    assert [len(prompt) for prompt in prompts] == [1, 5, 2000]
    assert set(prompts[2]) == set(range(40))


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"mean": 0}, "a length of 0 tokens"),
        ({"mean": 5, "range_ratio": 1.0}, "--range-ratio is 1"),
        ({"mean": 5, "sigma": -1.0}, "sigma of a length is -1"),
        ({"mean": 5, "sigma": 1.0, "range_ratio": 0.5}, "give one of them"),
    ],
)
def test_what_makes_no_distribution_is_refused(lengths: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lengths(**lengths)  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.nan])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="--request-rate is"):
        due_times(3, rate, rng())
