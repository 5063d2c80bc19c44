"""Rows, tokens and memory are shared fairly among tenants and their groups, and no token changes by that."""

import gc
import tracemalloc
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagleray.cluster.core.fairness import Group, Tenant
from eagleray.cluster.core.messages import EngineRequest
from eagleray.cluster.core.request import Request
from eagleray.cluster.core.scheduler import MAX_TOLD, Scheduler
from eagleray.workers.protocol.messages import Sampling
from support.inline_engine import InlineEngine
from support.toy_rank import VOCAB_SIZE, ToyRank, generate

NUM_ROWS, BUDGET = 8, 32
ENDLESS = 10_000


class Engine(InlineEngine):
    """A toy rank with much memory and few rows."""

    def __init__(self, depth: int = 2, *, num_blocks: int = 20_000, **options: Any) -> None:
        self.rank = ToyRank(num_blocks, 4)
        settings = {"max_num_seqs": NUM_ROWS, "max_num_batched_tokens": BUDGET} | options
        super().__init__(Scheduler(num_blocks=num_blocks, block_size=4, **settings), self.rank, depth)

    def turns(self, count: int) -> None:
        for _ in range(count):
            assert self.turn()

    def turns_until(self, done: Callable[[], bool]) -> int:
        count = 0
        while not done():
            assert self.turn(), "there is nothing left to do"
            count += 1
            assert count < 1000, "it never came"
        return count

    def served(self, turns: int = 1) -> set[int]:
        """The sequences that have tokens in the next turns."""
        before = {id: len(self.token_ids(id)) for id in self.news}
        self.turns(turns)
        return {id for id in self.news if len(self.token_ids(id)) > before[id]}


@pytest.fixture(params=[1, 2, 3], ids=lambda depth: f"{depth} in flight")
def depth(request: pytest.FixtureRequest) -> int:
    value: int = request.param
    return value


# ---- rows


def test_one_sequence_has_a_row_at_once_where_another_request_has_thousands(depth: int) -> None:
    engine = Engine(depth)
    engine.add(0, [1, 2, 3], max_tokens=4000, n=4096)
    engine.turns(50)
    engine.add(5000, [4, 5], max_tokens=2)
    assert engine.turns_until(lambda: engine.finish_reason(5000) is not None) <= 2 + depth
    assert engine.token_ids(5000) == generate([4, 5], 2)
    assert engine.scheduler.stats().num_preemptions == 1
    assert len(engine.served(2 + depth)) == NUM_ROWS, "the row goes back"


def test_memory_that_one_request_has_filled_goes_to_another_at_once(depth: int) -> None:
    engine = Engine(depth, num_blocks=100)
    engine.add(0, [1, 2, 3], max_tokens=300, n=64)
    engine.turns_until(lambda: engine.scheduler.stats().num_preemptions > 2)
    engine.add(5000, list(range(40)), max_tokens=2)
    turns = engine.turns_until(lambda: engine.finish_reason(5000) is not None)
    assert turns <= 8 + depth
    assert engine.token_ids(5000) == generate(list(range(40)), 2)


def test_each_newcomer_takes_one_row_once_and_the_many_go_on(depth: int) -> None:
    engine = Engine(depth)
    engine.add(0, [1, 2, 3], max_tokens=60, n=40)
    engine.turns(10)
    for index in range(50):
        engine.add(1000 + index, [index, 7], max_tokens=3)
        engine.turns(6)
    assert all(engine.finish_reason(1000 + index) == "length" for index in range(49))
    assert 0 < engine.scheduler.stats().num_preemptions <= 50
    assert all(engine.token_ids(index) == generate([1, 2, 3], 60) for index in range(8))
    engine.run()
    assert all(engine.token_ids(index) == generate([1, 2, 3], 60) for index in range(40))


def test_a_key_with_many_requests_leaves_others_their_share(depth: int) -> None:
    engine = Engine(depth)
    for index in range(100):
        engine.add(index, [index, 1], max_tokens=40, tenant="many")
    engine.turns(10)
    for index in range(20):
        engine.add(1000 + index, [index, 2], max_tokens=40, tenant="few")
    engine.turns(4 + depth)
    assert len(engine.served(1) & set(range(1000, 1020))) >= NUM_ROWS // 3, "soon: all but a third"
    engine.turns(50)
    served = engine.served(1)
    assert len(served & set(range(1000, 1020))) >= NUM_ROWS // 2 - 1, "once others have ended: half"
    engine.run()


@dataclass(frozen=True)
class Asked:
    tenant: int
    n: int
    turns_before: int


asked = st.builds(Asked, st.integers(0, 3), st.integers(1, 20), st.integers(0, 3))


@given(st.lists(asked, min_size=1, max_size=12), st.sampled_from([1, 2]))
@settings(max_examples=80, deadline=None, derandomize=True)
def test_nobody_who_waits_holds_less_than_half_of_what_another_holds(requests: list[Asked], depth: int) -> None:
    """After a while in which nobody comes or goes; compared with who was served, whatever the code thinks."""
    engine = Engine(depth)
    owner: dict[int, tuple[int, int]] = {}
    for number, request in enumerate(requests):
        for _ in range(request.turns_before):
            engine.turn()
        first = 1000 * number
        engine.add(first, [number, number], max_tokens=ENDLESS, n=request.n, tenant=str(request.tenant))
        owner |= {first + index: (request.tenant, number) for index in range(request.n)}
    engine.turns(2 * NUM_ROWS + depth)
    served = engine.served(1)
    assert len(served) == min(NUM_ROWS, len(owner)), "no row is idle while somebody waits"
    in_tenant, in_group = Counter(owner[id][0] for id in served), Counter(owner[id] for id in served)
    for tenant, group in {owner[id] for id in owner.keys() - served}:
        assert max(in_tenant.values()) < 2 * (in_tenant[tenant] + 1)
        of_tenant = [num for (who, _), num in in_group.items() if who == tenant]
        assert max(of_tenant, default=0) < 2 * (in_group[tenant, group] + 1)
    for id in list(owner):
        engine.abort(id)
    engine.run()
    assert engine.scheduler.num_free_rows == NUM_ROWS


# ---- tokens of a step


def test_rows_that_decode_have_a_token_a_step_whatever_the_priority_of_a_long_prompt(depth: int) -> None:
    engine = Engine(depth)
    for index in range(6):
        engine.add(index, [index, 1], max_tokens=ENDLESS)
    engine.turns(5)
    engine.add(6, list(range(40)) * 50, max_tokens=1, priority=-1)
    while not engine.finish_reason(6):
        assert set(range(6)) <= engine.served(1)
    for index in range(6):
        engine.abort(index)
    engine.run()


@pytest.mark.parametrize("num_long", [1, 5])
def test_short_prompts_pass_long_ones_which_have_half_of_the_budget(depth: int, num_long: int) -> None:
    engine = Engine(depth)
    long = [[index, *range(49)] * 30 for index in range(num_long)]
    for index, prompt in enumerate(long):
        engine.add(index, prompt, max_tokens=1)
    num_turns = 0
    while not all(engine.finish_reason(index) for index in range(num_long)):
        short = 1000 + num_turns
        engine.add(short, [num_turns % VOCAB_SIZE] * 9, max_tokens=1)
        num_turns += engine.turns_until(lambda short=short: engine.finish_reason(short) is not None)  # type: ignore[misc]
        assert num_turns <= (short - 1000) + 3 + depth
        assert engine.token_ids(short) == generate([(short - 1000) % VOCAB_SIZE] * 9, 1)
    assert [engine.token_ids(index) for index in range(num_long)] == [generate(prompt, 1) for prompt in long]
    assert num_turns <= ceil(sum(map(len, long)) / (BUDGET / 2)) + depth + num_long


def test_one_call_is_served_in_order_and_wastes_no_token_of_a_step(depth: int) -> None:
    """As first come, first served: prompts of any length, many of them longer than what a step has left."""
    engine, rng = Engine(depth, enable_prefix_caching=False, max_num_seqs=BUDGET), Random(3)
    prompts = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 9, 30, 100]))] for _ in range(200)]
    for index, prompt in enumerate(prompts):
        engine.add(index, prompt, max_tokens=2, group="call 0")
    begun: list[int] = []
    num_turns = 0
    while engine.turn():
        num_turns += 1
        begun += [index for index in range(200) if engine.news[index] and index not in begun]
    assert begun == sorted(begun) == list(range(200))
    assert num_turns <= ceil((sum(map(len, prompts)) + 200) / BUDGET) + depth + 1
    assert [engine.token_ids(index) for index in range(200)] == [generate(prompt, 2) for prompt in prompts]


@pytest.mark.parametrize("options", [{}, {"max_chunk_tokens": 8}, {"num_blocks": 120}], ids=str)
def test_sequences_of_one_prompt_compute_it_once(options: dict[str, Any]) -> None:
    engine = Engine(**options)
    prompt = [index % VOCAB_SIZE for index in range(201)]
    engine.add(0, prompt, max_tokens=3, n=30)
    engine.run()
    assert all(engine.token_ids(index) == generate(prompt, 3) for index in range(30))
    repeated = 8 * 201 if "max_chunk_tokens" in options else 0  # rows that chunks end early run side by side
    assert engine.rank.num_tokens_run <= 201 + 30 * (1 + 3 + 2) + repeated


def test_sequences_of_several_long_prompts_side_by_side_compute_each_once(depth: int) -> None:
    engine = Engine(depth)
    prompts = [[number, *(index % VOCAB_SIZE for index in range(300))] for number in range(3)]
    for number, prompt in enumerate(prompts):
        engine.add(100 * number, prompt, max_tokens=2, n=4)
    engine.run()
    for number, prompt in enumerate(prompts):
        assert all(engine.token_ids(100 * number + index) == generate(prompt, 2) for index in range(4))
    assert engine.rank.num_tokens_run <= 3 * (301 + 4 * (4 + 2 + depth))


def test_thousands_of_sequences_share_one_prompt_until_they_run_and_no_step_tells_too_much() -> None:
    prompt = array("i", [index % VOCAB_SIZE for index in range(100_000)]).tobytes()
    request = EngineRequest(0, prompt, Sampling(), max_tokens=100, seeds=list(range(1, 4096)))
    assert len(msgspec.msgpack.encode(request)) < len(prompt) + 100_000
    scheduler = Scheduler(num_blocks=20_000, block_size=16, max_num_seqs=256, max_num_batched_tokens=2**17)
    tracemalloc.start()
    scheduler.add(b"me", request)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size < 4096 * 2000 + len(prompt)
    for _ in range(3):
        step = scheduler.schedule()
        assert step is not None
        assert step.start
        assert sum(len(start.token_ids) for start in step.start) <= 4 * MAX_TOLD + len(prompt)


# ---- nothing is lost, nothing is left


def num_alive(kind: type) -> int:
    gc.collect()
    return sum(type(each) is kind for each in gc.get_objects())


@pytest.mark.slow
def test_waiting_requests_that_are_aborted_leave_no_memory_behind_under_load_of_higher_priority() -> None:
    before = [num_alive(kind) for kind in (Request, Group, Tenant)]
    engine = Engine(max_num_seqs=2)
    for index in range(500):
        engine.add(1_000_000 + index, [1] * 100, max_tokens=5, priority=5)
        engine.add(index, [2, 3], max_tokens=2, priority=-5, tenant=str(index % 3))
        engine.turn()
        if index > 10:
            engine.abort(1_000_000 + index)
    waiting = engine.scheduler.stats().num_waiting
    assert num_alive(Request) - before[0] <= waiting + 2 + 4, "those that wait, run, or were in a step in flight"
    assert num_alive(Group) - before[1] <= waiting + 2 + 4
    engine.run()
    engine.scheduler.schedule()
    assert [num_alive(kind) for kind in (Request, Group, Tenant)] == before


@dataclass(frozen=True)
class Event:
    kind: str
    number: int
    n: int
    length: int
    max_tokens: int


events = st.lists(
    st.builds(
        Event,
        st.sampled_from(["add", "add", "abort", "turn", "turn", "turn"]),
        st.integers(0, 40),
        st.integers(1, 6),
        st.integers(1, 90),
        st.integers(1, 30),
    ),
    max_size=80,
)
small = st.sampled_from(
    [
        {},
        {"num_blocks": 40},
        {"num_blocks": 40, "enable_prefix_caching": False, "max_chunk_tokens": 7},
        {"max_num_seqs": 2},
        {"max_num_batched_tokens": NUM_ROWS},
    ]
)


@given(events, small, st.integers(1, 3), st.booleans())
@settings(max_examples=120, deadline=None, derandomize=True)
def test_tokens_are_right_and_all_end_whoever_comes_and_goes(
    events: list[Event], options: dict[str, Any], depth: int, with_priorities: bool
) -> None:
    engine = Engine(depth, **options)
    expected: dict[int, list[int]] = {}
    for number, event in enumerate(events):
        match event.kind:
            case "add":
                prompt = [(event.number + index * index) % VOCAB_SIZE for index in range(event.length)]
                engine.add(
                    10 * number,
                    prompt,
                    event.max_tokens,
                    event.number % 3 if with_priorities else 0,
                    n=event.n,
                    group=["", "one", "two"][event.number % 3],
                    tenant=["", "a", "b", "c"][event.number % 4],
                )
                tokens = generate(prompt, event.max_tokens)
                expected |= {10 * number + index: tokens for index in range(event.n)}
            case "abort" if expected:
                engine.abort(sorted(expected)[event.number % len(expected)])
            case _:
                engine.turn()
    engine.run()
    for id, tokens in expected.items():
        ended = engine.finish_reason(id)
        assert ended in ("length", "abort")
        assert engine.token_ids(id) == (tokens if ended == "length" else tokens[: len(engine.token_ids(id))])
    stats = engine.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_used_blocks) == (0, 0, 0)
    assert engine.scheduler.num_free_rows == options.get("max_num_seqs", NUM_ROWS)
    assert engine.rank.largest_batch <= options.get("max_num_batched_tokens", BUDGET)
