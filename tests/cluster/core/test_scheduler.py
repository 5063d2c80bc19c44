"""The scheduler, with a rank whose tokens can be foretold, with one and with several steps in flight."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from eagleray.cluster.core.scheduler import Scheduler
from eagleray.workers.protocol.messages import Step, StepOutput
from support.inline_engine import InlineEngine
from support.toy_rank import VOCAB_SIZE, ToyRank, generate


class Engine(InlineEngine):
    """With a toy rank and little room."""

    def __init__(self, depth: int, *, num_blocks: int = 64, block_size: int = 4, **options: Any) -> None:
        self.rank = ToyRank(num_blocks, block_size)
        settings = {"max_num_seqs": 8, "max_num_batched_tokens": 32} | options
        super().__init__(Scheduler(num_blocks=num_blocks, block_size=block_size, **settings), self.rank, depth)


@pytest.fixture(params=[1, 2, 3], ids=lambda depth: f"{depth} in flight")
def depth(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def some_prompts(rng: Random, count: int) -> list[list[int]]:
    """Of many lengths, a third of them beginning alike."""
    common = [rng.randrange(VOCAB_SIZE) for _ in range(24)]
    return [
        (common[: rng.randrange(4, 24)] if rng.random() < 0.3 else [])
        + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))]
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_chunk_tokens": 7},
        {"mixed_step_tokens": 3},
        {"enable_prefix_caching": False},
        {"num_blocks": 20},
        {"num_blocks": 20, "enable_prefix_caching": False, "max_chunk_tokens": 3},
        {"max_num_seqs": 1},
        {"block_size": 1, "num_blocks": 70},
    ],
    ids=str,
)
def test_tokens_are_the_same_whatever_runs_beside_a_request(depth: int, options: dict[str, Any]) -> None:
    engine, rng = Engine(depth, **options), Random(1)
    prompts = some_prompts(rng, 40)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, max_tokens=1 + index % 9)
    engine.run()
    for index, prompt in enumerate(prompts):
        assert engine.token_ids(index) == generate(prompt, 1 + index % 9)
        assert engine.finish_reason(index) == "length"
    assert engine.rank.largest_batch <= 32


def test_little_memory_forces_preemption_and_the_youngest_gives_way(depth: int) -> None:
    engine = Engine(depth, num_blocks=10)
    for index in range(4):
        engine.add(index, [index] * 5, max_tokens=20)
    ended: list[int] = []
    while engine.turn():
        ended += [i for i in range(4) if i not in ended and engine.finish_reason(i)]
    assert engine.scheduler.stats().num_preemptions > 0
    assert ended == [0, 1, 2, 3]
    assert [engine.token_ids(i) for i in range(4)] == [generate([i] * 5, 20) for i in range(4)]


def test_a_prefix_that_was_computed_is_not_computed_again(depth: int) -> None:
    engine = Engine(depth)
    prompt = list(range(21))
    engine.add(0, prompt, max_tokens=3)
    engine.run()
    before = engine.rank.num_tokens_run
    engine.add(1, prompt, max_tokens=3)
    engine.run()
    assert engine.token_ids(0) == engine.token_ids(1) == generate(prompt, 3)
    assert engine.news[1][0].num_cached_tokens == 20
    assert engine.rank.num_tokens_run - before <= 1 + 3 + depth


def test_requests_of_one_step_share_the_blocks_of_a_common_prompt(depth: int) -> None:
    engine = Engine(depth)
    prompt = list(range(17))
    for index in range(4):
        engine.add(index, prompt, max_tokens=1)
    engine.run()
    assert [engine.news[i][0].num_cached_tokens for i in range(4)] == [0, 16, 16, 16]
    assert engine.rank.num_tokens_run == 17 + 3


def test_a_wholly_cached_prompt_still_runs_its_last_token(depth: int) -> None:
    engine = Engine(depth)
    for index in range(2):
        engine.add(index, list(range(16)), max_tokens=2)
        engine.run()
    assert engine.news[1][0].num_cached_tokens == 12
    assert engine.token_ids(0) == engine.token_ids(1)


def test_a_stop_token_ends_a_request_and_what_was_computed_too_much_is_dropped(depth: int) -> None:
    engine = Engine(depth)
    prompt = [3, 1, 4]
    stop = generate(prompt, 10)[4]
    engine.add(0, prompt, max_tokens=10, stop_token_ids=[stop])
    engine.add(1, [9, 9], max_tokens=30)
    engine.run()
    assert engine.token_ids(0) == generate(prompt, 10, [stop])
    assert engine.finish_reason(0) == "stop"
    assert engine.token_ids(1) == generate([9, 9], 30)


def test_lower_priority_numbers_run_first(depth: int) -> None:
    engine = Engine(depth, max_num_seqs=1)
    for index, priority in enumerate([5, 0, -3, 5]):
        engine.add(index, [index, index], max_tokens=2, priority=priority)
    ended: list[int] = []
    while engine.turn():
        ended += [i for i in range(4) if i not in ended and engine.finish_reason(i)]
    assert ended == [2, 1, 0, 3]


def test_a_running_request_is_not_starved_by_a_long_prompt(depth: int) -> None:
    engine = Engine(depth, max_num_batched_tokens=8)
    engine.add(0, [1, 2], max_tokens=12)
    engine.turn()
    engine.add(1, list(range(40)) * 3, max_tokens=1)
    for _ in range(12 + depth):
        engine.turn()
    assert engine.token_ids(0) == generate([1, 2], 12)
    assert engine.token_ids(1) == []
    engine.run()
    assert engine.rank.largest_batch <= 8


def test_a_mixed_step_is_small_for_those_who_decode(depth: int) -> None:
    """Not where nobody decodes, nor where so much waits that throughput comes first."""

    def largest(prompt: int, *, decoding: bool, others: int = 0) -> int:
        """Of the steps until a prompt has run, beside one request that decodes and before others that wait."""
        engine = Engine(depth, num_blocks=500, max_num_batched_tokens=100, mixed_step_tokens=10, max_num_seqs=4)
        if decoding:
            engine.add(0, [1, 2], max_tokens=100)
            engine.turn()
        for index in range(1, 2 + others):
            engine.add(index, [3 + index] * prompt, max_tokens=1)
        while not engine.token_ids(1):
            engine.turn()
        return engine.rank.largest_batch

    assert largest(80, decoding=True) == 10
    assert largest(80, decoding=False) == 80
    assert largest(81, decoding=True) == 82
    assert largest(40, decoding=True, others=1) == 10
    assert largest(40, decoding=True, others=5) == 100


def test_many_who_decode_leave_prompts_half_of_a_mixed_step(depth: int) -> None:
    engine = Engine(depth, num_blocks=100, mixed_step_tokens=4)
    for index in range(6):
        engine.add(index, [1 + index], max_tokens=60)
    engine.turn()
    engine.add(6, [9] * 30, max_tokens=1)
    while not engine.token_ids(6):
        engine.turn()
    assert engine.rank.largest_batch == 6 + 2
    assert len(engine.token_ids(0)) <= 30 // 2 + 3 * depth


def test_prompt_logprobs_come_once_and_in_order(depth: int) -> None:
    engine = Engine(depth, num_blocks=12, max_chunk_tokens=7)
    prompts = [[index] * 15 for index in range(4)]
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, max_tokens=20, prompt_logprobs=0)
    engine.run()
    assert engine.scheduler.stats().num_preemptions > 0
    for index, prompt in enumerate(prompts):
        positions = [-entry.logprobs[0] for tokens in engine.news[index] for entry in tokens.prompt_logprobs]
        assert positions == list(range(1, 15))
        assert engine.token_ids(index) == generate(prompt, 20)


def test_a_request_that_could_never_fit_is_refused_with_the_figures() -> None:
    engine = Engine(1, num_blocks=4)
    with pytest.raises(ValueError, match="16 tokens"):
        engine.add(0, [1] * 10, max_tokens=8)
    engine.add(1, [1] * 10, max_tokens=7)
    engine.run()
    assert engine.token_ids(1) == generate([1] * 10, 7)


def test_an_id_in_use_is_refused() -> None:
    engine = Engine(1)
    engine.add(7, [1])
    with pytest.raises(ValueError, match="7 is already in use"):
        engine.add(7, [2])


def test_failure_ends_every_request_with_the_cause(depth: int) -> None:
    engine = Engine(depth, max_num_seqs=2)
    for index in range(4):
        engine.add(index, [index], max_tokens=5)
    engine.turn()
    news = engine.scheduler.fail("rank 1 is gone")
    assert {tokens.id for _, tokens in news} == {0, 1, 2, 3}
    assert {(tokens.finish_reason, tokens.error) for _, tokens in news} == {("error", "rank 1 is gone")}
    assert engine.scheduler.kv_cache.num_used == 0
    assert engine.scheduler.num_unfinished == 0


def test_what_was_computed_before_a_failure_is_not_found_after_it(depth: int) -> None:
    engine = Engine(depth)
    engine.add(0, list(range(16)), max_tokens=5)
    engine.turn()
    engine.scheduler.fail("rank 1 is gone")
    engine.add(1, list(range(16)), max_tokens=1)
    step = engine.scheduler.schedule()
    assert step is not None
    assert step.start[0].num_computed_tokens == 0


@pytest.mark.parametrize(
    ("depth", "seed"),
    [
        pytest.param(depth, seed, marks=[] if (depth, seed) == (2, 0) else pytest.mark.soak)
        for depth in (1, 2, 3)
        for seed in range(3)
    ],
)
def test_nothing_is_left_behind_by_two_thousand_requests_with_aborts(depth: int, seed: int) -> None:
    engine, rng = Engine(depth, num_blocks=40, max_chunk_tokens=9), Random(seed)
    prompts = some_prompts(rng, 2000)
    max_tokens = [rng.randrange(1, 25) for _ in prompts]
    stops = [rng.sample(range(VOCAB_SIZE), rng.randrange(3)) for _ in prompts]
    aborted = set()
    added = 0
    while added < len(prompts) or engine.scheduler.num_unfinished:
        while added < len(prompts) and rng.random() < 0.5:
            engine.add(added, prompts[added], max_tokens[added], rng.randrange(3), stop_token_ids=stops[added])
            added += 1
        if added and rng.random() < 0.2:
            victim = rng.randrange(max(0, added - 12), added)
            engine.abort(victim)
            if engine.finish_reason(victim) == "abort":
                aborted.add(victim)
        engine.turn()
    engine.run()

    for index, prompt in enumerate(prompts):
        expected = generate(prompt, max_tokens[index], stops[index])
        if index in aborted:
            assert expected[: len(engine.token_ids(index))] == engine.token_ids(index)
        else:
            assert engine.token_ids(index) == expected
    assert len(aborted) > 50
    stats = engine.scheduler.stats()
    assert stats.num_preemptions > 50
    assert stats.num_prefix_hit_tokens > 0
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert engine.scheduler.num_free_rows == 8
    engine.add(99999, [1], max_tokens=1)  # the next step tells the rank of every row that has ended
    engine.run()
    engine.scheduler.schedule()
    assert len(engine.rank.rows) <= 1


class ForgetfulRank(ToyRank):
    """Runs out of memory in some steps, after it has begun with them, and then skips all up to a restart."""

    def __init__(self, num_blocks: int, block_size: int, fails: Callable[[int, int], bool]) -> None:
        super().__init__(num_blocks, block_size)
        self.failures: list[tuple[int, int]] = []  # tokens and requests of each
        self._fails = fails
        self._skipping = False

    def run(self, step: Step) -> StepOutput:
        self._skipping = self._skipping and not step.restart
        if self._skipping:
            return StepOutput(step.step)
        before = self.num_tokens_run
        output = super().run(step)
        num_requests = sum(step.chunks.get(row, 1) > 0 for row in self.rows)
        if self._fails(self.num_tokens_run - before, num_requests):
            self.failures.append((self.num_tokens_run - before, num_requests))
            self._skipping = True
            self._cache = [None] * len(self._cache)  # nothing of it may be read again
            return StepOutput(step.step, out_of_memory="no memory")
        return output


def forgetful_engine(
    depth: int, fails: Callable[[int, int], bool], **options: Any
) -> tuple[InlineEngine, ForgetfulRank]:
    settings = {"num_blocks": 64, "max_num_seqs": 8, "max_num_batched_tokens": 32} | options
    scheduler = Scheduler(block_size=4, **settings)
    rank = ForgetfulRank(scheduler.kv_cache.num_blocks, 4, fails)
    return InlineEngine(scheduler, rank, depth), rank


@pytest.mark.parametrize("options", [{}, {"num_blocks": 20}, {"max_chunk_tokens": 7}], ids=str)
def test_steps_that_run_out_of_memory_change_no_token(depth: int, options: dict[str, Any]) -> None:
    rng = Random(7)
    engine, rank = forgetful_engine(depth, lambda num_tokens, _: num_tokens > 1 and rng.random() < 0.2, **options)
    prompts = some_prompts(rng, 40)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, max_tokens=1 + index % 9, prompt_logprobs=0 if index % 5 == 0 else None)
    engine.run()
    assert len(rank.failures) >= 5
    for index, prompt in enumerate(prompts):
        assert engine.token_ids(index) == generate(prompt, 1 + index % 9)
        assert engine.finish_reason(index) == "length"
        scored = [entry.token_ids[0] for tokens in engine.news[index] for entry in tokens.prompt_logprobs]
        assert scored == (prompt[1:] if index % 5 == 0 else [])
    assert engine.scheduler.kv_cache.num_used == 0
    assert engine.scheduler.num_free_rows == 8


@pytest.mark.parametrize("options", [{}, {"num_blocks": 40}, {"max_chunk_tokens": 7}], ids=str)
def test_ranks_that_are_replaced_change_no_token(depth: int, options: dict[str, Any]) -> None:
    """At random moments, with steps in flight, by ranks with fewer blocks or more."""
    rng = Random(11)
    engine = Engine(depth, **options)
    prompts = some_prompts(rng, 40)
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, max_tokens=1 + index % 9, prompt_logprobs=0 if index % 5 == 0 else None)
    num_replaced = 0
    while engine.turn():
        if rng.random() < 0.2:
            num_replaced += 1
            engine.replace_rank(ToyRank(num_blocks := rng.choice([24, 40, 90]), 4), num_blocks)
    assert num_replaced >= 5
    for index, prompt in enumerate(prompts):
        assert engine.token_ids(index) == generate(prompt, 1 + index % 9)
        scored = [entry.token_ids[0] for tokens in engine.news[index] for entry in tokens.prompt_logprobs]
        assert scored == (prompt[1:] if index % 5 == 0 else [])
    assert engine.scheduler.kv_cache.num_used == 0
    assert engine.scheduler.num_free_rows == 8


def test_a_request_that_no_longer_fits_ends_with_an_error(depth: int) -> None:
    engine = Engine(depth)
    engine.add(0, [1] * 30, max_tokens=20)
    engine.add(1, [2] * 3, max_tokens=20)
    engine.turn()
    engine.replace_rank(ToyRank(6, 4), 6)
    engine.run()
    assert engine.finish_reason(0) == "error"
    assert "holds 24 tokens since the engine started again" in (engine.news[0][-1].error or "")
    assert engine.token_ids(1) == generate([2] * 3, 20)


def test_steps_shrink_until_they_fit_and_grow_again(depth: int) -> None:
    limit = 5
    engine, rank = forgetful_engine(depth, lambda num_tokens, _: num_tokens > limit)
    for index in range(8):
        engine.add(index, [index] * 20, max_tokens=6)
    engine.run()
    assert [engine.token_ids(index) for index in range(8)] == [generate([index] * 20, 6) for index in range(8)]
    assert [num_tokens for num_tokens, _ in rank.failures] == [32, 16, 8]
    limit = 32
    rank.largest_batch = 0
    for index in range(8, 48):
        engine.add(index, [index] * 20, max_tokens=6)
    engine.run()
    assert rank.largest_batch == 32


def test_a_request_whose_single_token_does_not_fit_fails_alone(depth: int) -> None:
    too_long = 30
    engine, rank = forgetful_engine(
        depth, lambda _num_tokens, _num_requests: any(row.num_computed_tokens > too_long for row in rank.rows.values())
    )
    for index in range(6):
        engine.add(index, [index] * (28 if index == 2 else 4), max_tokens=6)
    engine.run()
    for index in (0, 1, 3, 4, 5):
        assert engine.token_ids(index) == generate([index] * 4, 6)
    assert engine.finish_reason(2) == "error"
    assert engine.news[2][-1].error == "no memory"
    assert engine.token_ids(2) == generate([2] * 28, 3)


def test_requests_are_aborted_while_nothing_fits(depth: int) -> None:
    engine, rank = forgetful_engine(depth, lambda _num_tokens, num_requests: num_requests > 2)
    for index in range(8):
        engine.add(index, [index] * 5, max_tokens=9)
    engine.turn()
    assert rank.failures
    for index in range(0, 8, 2):
        engine.abort(index)
    engine.run()
    assert [engine.finish_reason(index) for index in range(8)] == ["abort", "length"] * 4
    assert engine.token_ids(7) == generate([7] * 5, 9)
    assert engine.scheduler.kv_cache.num_used == 0
