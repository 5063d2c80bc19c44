"""What steps are foretold to take, beside what they took."""

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.core.step_forecast import LEAD_S, NUM_KEPT, NUM_NEEDED, TELL_S, StepForecast
from eagleray.workers.protocol.messages import Sampling, StepOutput


@given(st.lists(st.floats(0.001, 100.0), min_size=NUM_NEEDED, max_size=3 * NUM_KEPT), st.integers(1, 100_000))
def test_no_step_is_foretold_to_take_longer_than_the_last_ones_of_its_size(seconds: list[float], size: int) -> None:
    forecast = StepForecast()
    for each in seconds:
        forecast.learn(size, each)
    least = min(seconds[-NUM_KEPT:])
    assert 0.8 * least < forecast.at_least(size) < least


def test_sizes_that_are_far_apart_are_told_apart() -> None:
    forecast = StepForecast()
    sizes = [1, 2, 3, 4, 8, 10, 64, 100, 1000, 2000, 8192]
    for size in sizes:
        for _ in range(NUM_NEEDED):
            forecast.learn(size, float(size))
    for size in sizes:
        assert 0.8 * size < forecast.at_least(size) < size
    assert forecast.at_least(1900) > 0, "a step of nearly the same size is known"


def test_little_knowledge_foretells_nothing() -> None:
    forecast = StepForecast()
    for _ in range(NUM_NEEDED - 1):
        forecast.learn(100, 1.0)
    assert forecast.at_least(100) == 0.0
    assert forecast.at_least(5000) == 0.0


def test_steps_that_did_not_run_say_nothing_of_how_long_they_take() -> None:
    """After a step that ran out of memory, those behind it are answered at once."""
    scheduler = Scheduler(num_blocks=64, block_size=4, max_num_seqs=2, max_num_batched_tokens=8)
    for request_id in range(2):
        scheduler.add(b"me", EngineRequest(request_id, array("i", [1]).tobytes(), Sampling(), max_tokens=40))

    def run(num_tokens: int) -> None:
        step = scheduler.schedule()
        assert step is not None
        token_ids = array("i", [1] * num_tokens).tobytes()
        scheduler.update(StepOutput(step.step, token_ids, gpu_seconds=10.0))

    for _ in range(NUM_KEPT):
        run(num_tokens=2)
    failed, skipped = scheduler.schedule(), scheduler.schedule()
    assert failed is not None
    assert skipped is not None
    scheduler.update(StepOutput(failed.step, out_of_memory="no memory"))
    scheduler.update(StepOutput(skipped.step))
    forecast = scheduler._forecast
    assert forecast.at_least(2) > 8.0


def test_a_step_is_due_before_the_ranks_are_done_and_sooner_if_long_prompts_wait() -> None:
    scheduler = Scheduler(num_blocks=20_000, block_size=16, max_num_seqs=4, max_num_batched_tokens=64)

    def add(request_id: int, num_tokens: int) -> None:
        prompt = array("i", [1] * num_tokens).tobytes()
        scheduler.add(b"me", EngineRequest(request_id, prompt, Sampling(), max_tokens=40))

    assert scheduler.due == 0.0, "nothing is in flight"
    add(0, 1)
    for _ in range(NUM_NEEDED):
        step = scheduler.schedule()
        assert step is not None
        scheduler.update(StepOutput(step.step, array("i", [1]).tobytes(), gpu_seconds=10.0))
    scheduler.schedule()
    soon = scheduler.due
    assert 8.0 < soon + LEAD_S - scheduler.clock.time < 10.0
    add(1, 100_000)
    add(2, 50_000)
    assert soon - scheduler.due == pytest.approx(150_000 * TELL_S)
    scheduler.abort(b"me", 1)
    assert soon - scheduler.due == pytest.approx(50_000 * TELL_S)
    scheduler.schedule()  # the other prompt begins
    assert scheduler.due == soon, "and nothing is known of a step of its size"
