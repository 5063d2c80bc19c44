"""Where a request's time went: each part grows when what it stands for is slow, and together they are all of it."""

import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

import msgspec
import pytest

from eagleray.cluster.core.engine_core import EngineCore
from eagleray.cluster.core.messages import Abort, EngineOutputs, Shutdown, Submit
from eagleray.cluster.core.request_check import EngineLimits
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.core.time_accounting import Spent, TimeAccounting
from eagleray.cluster.frontend.front_end import FrontEnd
from eagleray.cluster.frontend.inputs import ModelLimits
from eagleray.cluster.frontend.request_state import RequestState
from eagleray.cluster.outputs import RequestParts
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.workers.output_sender import OutputSender
from eagleray.workers.protocol.channel import Hub, Peer
from eagleray.workers.protocol.messages import RankControl, Step, StepOutput
from support.toy_rank import VOCAB_SIZE, ToyRank

BLOCK_SIZE = 4
STEPS = 12
SLOW_S = 0.02


@dataclass
class Slow:
    """An output that the device takes its time for."""

    output: StepOutput
    seconds: float

    def wait(self) -> StepOutput:
        time.sleep(self.seconds)
        return self.output


class ReportingExecutor:
    """A toy rank behind the output sender and the channel of real ones."""

    def __init__(self, num_blocks: int, step_s: float, send_s: float) -> None:
        self.num_blocks = num_blocks
        self._hub = Hub()
        self.pollable: Sequence[Any] = (self._hub.socket,)
        self._rank = ToyRank(num_blocks, BLOCK_SIZE)
        self._output_sender = OutputSender(self._hub.endpoint)
        self._step_s, self._send_s = step_s, send_s

    def send(self, message: Step | RankControl) -> None:
        assert isinstance(message, Step)
        time.sleep(self._send_s)
        launched = time.monotonic()
        self._output_sender.report(Slow(self._rank.run(message), self._step_s), launched)

    def receive(self) -> StepOutput | None:
        message = self._hub.receive()
        return None if message is None else msgspec.msgpack.decode(message[1], type=StepOutput)

    def suspects(self) -> str:
        return ""

    def start(self, size: int) -> int:
        return self.num_blocks

    def stop(self) -> None:
        self._hub.close()


class SlowScheduler(Scheduler):
    """One that has much to think about."""

    seconds = 0.0

    def schedule(self) -> Step | None:
        if self.num_unfinished:
            time.sleep(self.seconds)
        return super().schedule()


@dataclass(kw_only=True)
class Engine:
    """An engine core in a thread, and a front end in this one."""

    rows: int = 8
    num_blocks: int = 200
    step_s: float = 0.0
    send_s: float = 0.0
    schedule_s: float = 0.0
    ended: list[RequestState] = field(default_factory=list)

    def run(self, *prompts: list[int]) -> list[RequestParts]:
        """Requests of `STEPS` tokens, all at once; their parts in the order in which they end."""
        hub = Hub()
        scheduler = SlowScheduler(
            num_blocks=self.num_blocks, block_size=BLOCK_SIZE, max_num_seqs=self.rows, max_num_batched_tokens=64
        )
        scheduler.seconds = self.schedule_s
        executor = ReportingExecutor(self.num_blocks, self.step_s, self.send_s)
        engine_limits = EngineLimits(vocab_size=VOCAB_SIZE, max_model_len=500)
        core = EngineCore(scheduler, executor, hub, engine_limits, steps_in_flight=2, step_timeout_s=30)
        thread = threading.Thread(target=core.run)
        thread.start()
        limits = ModelLimits(max_model_len=500, vocab_size=VOCAB_SIZE, eos_token_ids=frozenset())
        front_end = FrontEnd(None, limits, on_end=self.ended.append)
        peer = Peer(hub.endpoint, b"front end")
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True)
        generations = [front_end.make_request(prompt, params) for prompt in prompts]
        requests = [front_end.add(generation) for generation in generations]
        peer.send(msgspec.msgpack.encode(Submit(requests)))
        while front_end.num_running:
            payload = peer.receive(20)
            assert payload is not None
            _, aborts = front_end.process(msgspec.msgpack.decode(payload, type=EngineOutputs))
            peer.send(msgspec.msgpack.encode(Abort(aborts)))
        peer.send(msgspec.msgpack.encode(Shutdown()))
        thread.join()
        peer.close()
        self.num_preemptions = scheduler.stats().num_preemptions
        return [generation.parts for generation in self.ended if generation.parts is not None]


def assert_all_of_its_time(engine: Engine) -> None:
    """The parts add up to what passed, and none is negative: nothing counts twice."""
    for generation in engine.ended:
        assert generation.parts is not None
        assert generation.finished_time is not None
        parts = astuple(generation.parts)
        assert sum(parts) == pytest.approx(generation.finished_time - generation.arrival_time)
        assert min(parts) >= -1e-3


@pytest.mark.parametrize(
    ("slow", "part"),
    [({"step_s": SLOW_S}, "gpu"), ({"send_s": SLOW_S}, "broadcast"), ({"schedule_s": SLOW_S}, "schedule")],
)
def test_what_is_slow_takes_the_time(slow: dict[str, Any], part: str) -> None:
    """Nothing hides it here; only the sums' ends lie elsewhere, at the first and the last step."""
    engine = Engine(**slow)
    (parts,) = engine.run([1, 2, 3])
    assert getattr(parts, part) > SLOW_S * (STEPS - 2)
    assert_all_of_its_time(engine)


@dataclass
class Clock:
    """Stands for the module `time` where time is to pass only when a test says so."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("eagleray.cluster.core.time_accounting.time", clock)
    return clock


@pytest.mark.parametrize(
    ("gpu_s", "elsewhere_s", "spent"),
    [
        (8.0, 10.0, Spent(schedule=0.0, broadcast=2.0, gpu=8.0)),
        (8.0, 7.0, Spent(schedule=2.0, broadcast=0.0, gpu=8.0)),  # of the 3 s of its work, the ranks hide 1
        (10.0, 5.0, Spent(schedule=0.0, broadcast=0.0, gpu=10.0)),  # they hide all of it
        (0.0, 4.0, Spent(schedule=6.0, broadcast=4.0, gpu=0.0)),
        (1.0, 4.0, Spent(schedule=6.0, broadcast=3.0, gpu=1.0)),
    ],
)
def test_work_that_a_step_hides_does_not_count(clock: Clock, gpu_s: float, elsewhere_s: float, spent: Spent) -> None:
    accounting = TimeAccounting()
    for steps in range(1, 4):
        accounting.start(clock.now)
        accounting.send_or_sleep(elsewhere_s)
        clock.now += 10
        accounting.end_step(gpu_s)
        assert accounting.spent == Spent(steps * spent.schedule, steps * spent.broadcast, steps * spent.gpu)


def test_time_without_work_is_no_part_and_time_between_steps_is(clock: Clock) -> None:
    accounting = TimeAccounting()
    accounting.start(clock.now)
    clock.now += 3
    accounting.end_step(gpu_s=3.0)
    clock.now += 1
    accounting.start(clock.now)  # a window began with the output
    clock.now += 3
    accounting.end_step(gpu_s=3.0)
    accounting.stop()
    clock.now += 50
    accounting.start(clock.now)
    clock.now += 3
    accounting.end_step(gpu_s=3.0)
    assert accounting.spent == Spent(schedule=1.0, broadcast=0.0, gpu=9.0)


def test_no_part_is_longer_than_the_time_that_passed() -> None:
    """A rank's clock and the engine core's windows need not agree."""
    clock = TimeAccounting()
    clock.start(time.monotonic())
    begin = clock.time
    clock.end_step(gpu_s=100.0)
    clock.send_or_sleep(100.0)
    clock.end_step(gpu_s=0.0)
    assert min(msgspec.structs.astuple(clock.spent)) >= 0
    assert sum(msgspec.structs.astuple(clock.spent)) == pytest.approx(clock.time - begin)


def test_the_parts_add_up_where_work_is_hidden_by_a_slow_step() -> None:
    engine = Engine(step_s=2 * SLOW_S, schedule_s=SLOW_S / 2)
    for parts in engine.run([1], [2, 3], [4] * 50):
        assert parts.gpu > 2 * SLOW_S * (STEPS - 2)
    assert_all_of_its_time(engine)


def test_a_full_engine_makes_the_queue_grow() -> None:
    """Each waits for those before it, and what these took is no part of it beside the queue."""
    engine = Engine(rows=1, step_s=SLOW_S)
    first, second, third = engine.run([1], [2], [3])
    begun = [each.arrival_time + parts.queue for each, parts in zip(engine.ended, (first, second, third), strict=True)]
    assert begun[1] - begun[0] > SLOW_S * (STEPS - 2)
    assert begun[2] - begun[1] > SLOW_S * (STEPS - 2)
    assert min(first.gpu, second.gpu, third.gpu) > SLOW_S * (STEPS - 2)
    assert_all_of_its_time(engine)


def test_a_request_that_is_preempted_waits_again_and_its_parts_still_add_up() -> None:
    """Three requests that fit only while they are short."""
    engine = Engine(num_blocks=9, step_s=SLOW_S)
    *_, last = engine.run([1] * 6, [2] * 6, [3] * 6)
    assert engine.num_preemptions > 0
    assert last.queue > SLOW_S * 3
    assert_all_of_its_time(engine)
