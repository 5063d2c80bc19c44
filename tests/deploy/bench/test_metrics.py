"""A benchmark's figures against values worked out by hand and by numpy."""

import numpy as np
import pytest

from eagleray.deploy.bench.metrics import RequestTimes, Spread, decode_time, is_good, serving_figures, spread

FAST = RequestTimes(due=10.0, num_input_tokens=100, tokens=[10.5, 10.75, 11.25, 11.5])
SLOW = RequestTimes(due=11.0, num_input_tokens=50, tokens=[14.0, 14.5])
SINGLE = RequestTimes(due=12.0, num_input_tokens=7, tokens=[12.25])
FAILED = RequestTimes(due=12.0, num_input_tokens=1000, tokens=[12.5], error="no")


def test_one_requests_times() -> None:
    assert FAST.time_to_first_token == 0.5
    assert FAST.latency == 1.5
    assert FAST.time_per_output_token == pytest.approx(1 / 3)
    assert FAST.inter_token_latencies == [0.25, 0.5, 0.25]


def test_one_token_has_no_interval_and_none_has_no_time() -> None:
    assert (SINGLE.time_per_output_token, SINGLE.inter_token_latencies, SINGLE.latency) == (None, [], 0.25)
    nothing = RequestTimes(due=0.0, num_input_tokens=3)
    assert (nothing.time_to_first_token, nothing.latency, nothing.time_per_output_token) == (None, None, None)


def test_a_spread_is_numpys() -> None:
    values = np.random.default_rng(0).exponential(size=37).tolist()
    expected = [np.mean(values), *(np.percentile(values, percent) for percent in (50, 90, 95, 99))]
    found = spread(values)
    assert found is not None
    assert [found.mean, found.p50, found.p90, found.p95, found.p99] == pytest.approx(expected)
    assert spread([2.0, 1.0, 1.5]) == Spread(1.5, 1.5, 1.9, 1.95, 1.99)
    assert spread([]) is None


def test_figures_of_many_requests_leave_failed_ones_out_of_every_rate() -> None:
    figures = serving_figures([FAST, SLOW, SINGLE, FAILED])
    assert (figures.num_requests, figures.num_failed, figures.duration_s) == (4, 1, 4.5)
    assert (figures.num_input_tokens, figures.num_output_tokens) == (157, 7)
    assert figures.requests_per_s == pytest.approx(3 / 4.5)
    assert figures.input_tokens_per_s == pytest.approx(157 / 4.5)
    assert figures.output_tokens_per_s == pytest.approx(7 / 4.5)
    assert figures.total_tokens_per_s == pytest.approx(164 / 4.5)
    assert figures.goodput_requests_per_s is None
    assert figures.time_to_first_token_s == spread([0.5, 3.0, 0.25])
    assert figures.time_per_output_token_s == spread([1 / 3, 0.5])
    assert figures.inter_token_latency_s == spread([0.25, 0.5, 0.25, 0.5])
    assert figures.latency_s == spread([1.5, 3.5, 0.25])


def test_goodput_counts_requests_within_every_limit() -> None:
    assert is_good(FAST, {"ttft": 0.5, "tpot": 0.34})
    assert not is_good(FAST, {"ttft": 0.5, "tpot": 0.33})
    assert not is_good(SLOW, {"ttft": 1.0, "e2el": 9.0})
    assert not is_good(FAILED, {"ttft": 9.0})
    assert is_good(SINGLE, {"tpot": 0.001})
    figures = serving_figures([FAST, SLOW, SINGLE, FAILED], {"ttft": 0.5})
    assert figures.goodput_requests_per_s == pytest.approx(2 / 4.5)


def test_nothing_that_ended_gives_zero_rates() -> None:
    figures = serving_figures([FAILED], {"ttft": 1.0})
    assert (figures.num_failed, figures.requests_per_s, figures.goodput_requests_per_s) == (1, 0, 0)
    assert figures.latency_s is None


def test_decode_time_takes_the_first_tokens_time_off() -> None:
    assert decode_time(5.0, 1.0, 9) == 0.5
    assert decode_time(1.0, 1.0, 1) is None
