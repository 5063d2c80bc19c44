"""Speculation changes how many steps a request takes, and nothing else. A rank's tokens can be foretold."""

from array import array
from random import Random
from typing import Any

import pytest

from eagleray.cluster.core.prompt_lookup import MAX_INDEXED, PromptLookup
from eagleray.cluster.core.scheduler import Scheduler
from support.inline_engine import InlineEngine
from support.toy_rank import VOCAB_SIZE, ToyRank, generate, next_token, repeating_token


class Engine(InlineEngine):
    """With a toy rank whose texts come to repeat themselves."""

    def __init__(
        self, depth: int, *, num_blocks: int = 200, block_size: int = 4, draw: Any = repeating_token, **options: Any
    ) -> None:
        self.rank = ToyRank(num_blocks, block_size, draw)
        settings = {"max_num_seqs": 20, "max_num_batched_tokens": 64, "num_speculative_tokens": 8} | options
        self.num_steps = 0
        super().__init__(Scheduler(num_blocks=num_blocks, block_size=block_size, **settings), self.rank, depth)

    def turn(self) -> bool:
        self.num_steps += 1
        return super().turn()


@pytest.fixture(params=[1, 2, 3], ids=lambda depth: f"{depth} in flight")
def depth(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = Random(seed)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 40},
        {"num_blocks": 40, "enable_prefix_caching": False, "max_chunk_tokens": 5},
        {"max_num_seqs": 3},
        {"max_num_batched_tokens": 20},
        {"block_size": 1, "num_blocks": 160},
        {"num_speculative_tokens": 1},
    ],
    ids=str,
)
def test_tokens_are_those_without_a_draft(depth: int, options: dict[str, Any]) -> None:
    engine = Engine(depth, **options)
    for index, prompt in enumerate(prompts(20)):
        engine.add(index, prompt, max_tokens=1 + 9 * (index % 9))
    engine.run()
    for index, prompt in enumerate(prompts(20)):
        assert engine.token_ids(index) == generate(prompt, 1 + 9 * (index % 9), draw=repeating_token)
        assert engine.finish_reason(index) == "length"
    stats = engine.scheduler.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert engine.rank.largest_batch <= options.get("max_num_batched_tokens", 64)
    assert engine.rank.most_drawn <= options.get("max_num_seqs", 20)
    assert stats.num_used_blocks == 0
    assert (stats.num_preemptions > 0) == ("num_blocks" in options)


def test_a_stop_token_within_an_accepted_draft_ends_the_request(depth: int) -> None:
    """Only the prompt had it before, so it comes where the prompt's text is drafted again."""
    engine = Engine(depth, draw=lambda token_ids: (token_ids[-1] + 1) % 16)
    for stop in range(16):
        engine.add(stop, list(range(16)) * 3, max_tokens=80, stop_token_ids=[stop], logprobs=0)
    engine.run()
    for stop in range(16):
        assert engine.token_ids(stop) == list(range(stop + 1))
        assert engine.finish_reason(stop) == "stop"
        named = [entry.token_ids[0] for tokens in engine.news[stop] for entry in tokens.logprobs]
        assert named == engine.token_ids(stop)


def test_prefixes_that_drafts_left_in_the_cache_are_right(depth: int) -> None:
    """A block that a wrong draft has written to is not found by others: the second request reads what it holds."""
    engine = Engine(depth, block_size=2)
    for index, prompt in enumerate(prompts(6, seed=1)):
        engine.add(index, prompt, max_tokens=50)
        engine.run()
        engine.add(100 + index, prompt + engine.token_ids(index)[:45], max_tokens=20)
        engine.run()
        whole = generate(prompt, 65, draw=repeating_token)
        assert engine.token_ids(100 + index) == whole[45:]
    assert engine.scheduler.stats().num_prefix_hit_tokens > 6 * 40


def test_requests_that_leave_and_ranks_that_begin_anew_lose_nothing(depth: int) -> None:
    engine, rng = Engine(depth, num_blocks=60), Random(depth)
    left = set()
    for index, prompt in enumerate(prompts(60, seed=2)):
        engine.add(index, prompt, max_tokens=60)
        for _ in range(rng.randrange(6)):
            engine.turn()
        if rng.random() < 0.2:
            leaving = rng.randrange(index + 1)
            engine.abort(leaving)
            left.add(leaving)
        if rng.random() < 0.1:
            engine.rank = ToyRank(60, 4, repeating_token)
            engine.replace_rank(engine.rank, 60)
    engine.run()
    for index, prompt in enumerate(prompts(60, seed=2)):
        expected = generate(prompt, 60, draw=repeating_token)
        assert engine.token_ids(index) == expected[: len(engine.token_ids(index))]
        assert index in left or len(engine.token_ids(index)) == 60


def test_a_text_that_repeats_itself_takes_far_fewer_steps() -> None:
    plain, quick = Engine(2, num_speculative_tokens=0), Engine(2)
    for engine in (plain, quick):
        engine.add(0, [1, 2], max_tokens=400)
        engine.run()
    assert quick.token_ids(0) == plain.token_ids(0)
    assert quick.num_steps < plain.num_steps / 3


@pytest.mark.parametrize("together", [1, 8])
def test_a_text_that_repeats_nothing_takes_hardly_more_steps(together: int) -> None:
    plain, quick = (Engine(2, num_speculative_tokens=most, draw=next_token, num_blocks=2000) for most in (0, 8))
    for engine in (plain, quick):
        for index in range(together):
            engine.add(index, [index, 2, 3], max_tokens=600)
        engine.run()
    assert [quick.token_ids(index) for index in range(together)] == [plain.token_ids(i) for i in range(together)]
    assert quick.num_steps <= 1.03 * plain.num_steps


def test_what_followed_last_time_is_drafted() -> None:
    lookup = PromptLookup()
    text = array("i", [5, 6, 7, 1, 2, 3, 5, 6, 7, 8, 9, 5, 6])
    assert not lookup.is_due(text)
    text.append(7)
    assert lookup.is_due(text)
    assert lookup.draft(text, 3).tolist() == [8, 9, 5]
    assert lookup.draft(text, 0).tolist() == []
    loop = array("i", [1, 2, 3, 4, 2, 3, 4])
    assert PromptLookup().draft(loop, 4).tolist() == [2, 3, 4, 2]


def test_drafts_grow_where_they_come_true_and_wait_where_they_do_not() -> None:
    lookup, text = PromptLookup(), array("i", [1, 2, 3] * 20)
    assert len(lookup.draft(text, 99)) == 4
    lookup.judge(4, 4, len(text), worth=2)
    assert len(lookup.draft(text, 99)) == 8
    lookup.judge(8, 0, len(text), worth=2)
    assert not lookup.is_due(text)
    text.extend([1, 2, 3])
    assert lookup.is_due(text)
    waits = []
    for _ in range(9):
        lookup.judge(4, 1, len(text), worth=2)
        before = len(text)
        while not lookup.is_due(text):
            text.append(text[-3])
        waits.append(len(text) - before)
    assert waits == sorted(waits)
    assert waits[-1] == 64


def test_a_long_prompt_is_learnt_a_little_in_every_step() -> None:
    """Its end is like its beginning, which is known from the first step on, and like its middle, which is not."""
    beginning, middle = array("i", [1, 2, 3, 4]), array("i", [5, 6, 7, 8])
    rest = array("i", range(100, 100 + 4 * MAX_INDEXED))
    lookup = PromptLookup()
    assert lookup.is_due(beginning + rest + middle + beginning[:3])
    late = PromptLookup()
    text = rest + middle + rest[:1] + middle[:3]
    steps = 0
    while not late.is_due(text):
        steps += 1
    assert steps == 4
