"""The engine core's loop with real sockets and a toy rank in this process."""

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import pytest

from eagleray.cluster.engine_core import EngineCore
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.messages import (
    Abort,
    EngineOutputs,
    EngineRequest,
    FrontEndMessage,
    ProfileAnswer,
    Shutdown,
    StartProfile,
    StopProfile,
    Submit,
    Tokens,
)
from eagleray.cluster.scheduler import Scheduler
from eagleray.workers.channel import Hub, Peer
from eagleray.workers.wire import Profile, Profiled, Sampling, Step, StepOutput
from support.toy_rank import ToyRank, generate

NUM_BLOCKS, BLOCK_SIZE = 64, 4


class ToyExecutor:
    """Runs each step when its output is asked for; `gate` holds outputs back."""

    def __init__(self) -> None:
        self.num_blocks = NUM_BLOCKS
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.pollable: Sequence[Any] = (self._fd,)
        self._rank = ToyRank(NUM_BLOCKS, BLOCK_SIZE)
        self._messages: deque[Step | Profile] = deque()
        self.sent: list[str] = []  # step, or what a profile is to do
        self.fault: str | None = None  # why the second of two ranks cannot profile

    def send(self, message: Step | Profile) -> None:
        self.sent.append("step" if isinstance(message, Step) else message.action)
        if self.sent[-1] == "drop":  # unanswered
            return
        self._messages.append(message)
        os.eventfd_write(self._fd, 1)

    def receive(self) -> StepOutput | list[Profiled] | None:
        if not self._messages or not self.gate.is_set():
            return None
        message = self._messages.popleft()
        if not self._messages:
            os.eventfd_read(self._fd)
        if isinstance(message, Step):
            return self._rank.run(message)
        file = "trace" if message.action == "stop" else ""
        return [Profiled(0, file), Profiled(1, file, self.fault)]

    def open(self) -> None:
        self.gate.set()

    def close(self) -> None:
        self.closed = True


class FrontEnd:
    """A front end's side of the channel."""

    def __init__(self, hub: Hub, name: bytes) -> None:
        self.peer = Peer(hub.endpoint, name)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Tokens] = {}
        self.profiles: list[ProfileAnswer] = []
        self.num_messages = 0

    def send(self, message: FrontEndMessage) -> None:
        self.peer.send(msgspec.msgpack.encode(message))

    def submit(self, request_id: int, prompt: list[int], max_tokens: int = 8) -> None:
        token_ids = array("i", prompt).tobytes()
        self.send(Submit([EngineRequest(request_id, token_ids, Sampling(), max_tokens)]))
        self.tokens[request_id] = []

    def ask(self, message: StartProfile | StopProfile) -> ProfileAnswer:
        before = len(self.profiles)
        self.send(message)
        self.wait(lambda: len(self.profiles) > before)
        assert self.profiles[-1].id == message.id
        return self.profiles[-1]

    def has_ended(self) -> bool:
        return bool(self.ends)

    def wait(self, done: Callable[[], bool]) -> None:
        while not done():
            payload = self.peer.receive(10)
            assert payload is not None, "no news for ten seconds"
            news = msgspec.msgpack.decode(payload, type=EngineOutputs)
            self.num_messages += 1
            assert news.number == self.num_messages
            self.profiles += news.profiles
            for tokens in news.outputs:
                self.tokens[tokens.id] += tokens.token_ids
                if tokens.finish_reason:
                    assert tokens.id not in self.ends, "a request ended twice"
                    self.ends[tokens.id] = tokens


class Core:
    """An engine core that runs in a thread."""

    def __init__(self, step_timeout_s: float = 30.0) -> None:
        self.hub = Hub()
        self.executor = ToyExecutor()
        self.scheduler = Scheduler(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=64
        )
        core = EngineCore(self.scheduler, self.executor, self.hub, steps_in_flight=2, step_timeout_s=step_timeout_s)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, args=(core,), daemon=True)
        self.thread.start()

    def _run(self, core: EngineCore) -> None:
        try:
            core.run()
        except EngineDeadError as error:
            self.error = error

    def front_end(self, name: bytes) -> FrontEnd:
        return FrontEnd(self.hub, name)

    def close(self) -> None:
        if self.thread.is_alive():
            self.executor.open()
            owner = self.front_end(b"owner")
            owner.send(Shutdown())
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert self.executor.closed


@pytest.fixture
def core() -> Iterator[Core]:
    core = Core()
    yield core
    core.close()


def test_front_ends_with_the_same_ids_get_their_own_tokens(core: Core) -> None:
    front_ends = [core.front_end(b"one"), core.front_end(b"two")]
    for number, front_end in enumerate(front_ends):
        front_end.submit(0, [number, 1, 2], max_tokens=30)
    for number, front_end in enumerate(front_ends):
        front_end.wait(front_end.has_ended)
        assert front_end.tokens[0] == generate([number, 1, 2], 30)


def test_an_abort_ends_one_request_and_no_other(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.submit(0, [1], max_tokens=200)
    front_end.submit(1, [2], max_tokens=20)
    front_end.send(Abort([0, 99]))
    front_end.wait(front_end.has_ended)
    assert front_end.ends[0].finish_reason == "abort"
    core.executor.open()
    front_end.send(Abort([]))  # wakes the core
    front_end.wait(lambda: 1 in front_end.ends)
    assert front_end.tokens[1] == generate([2], 20)


def test_a_request_that_cannot_run_fails_alone(core: Core) -> None:
    front_end = core.front_end(b"one")
    front_end.submit(0, [1, 2, 3], max_tokens=20)
    front_end.submit(1, [1] * 300, max_tokens=20)
    front_end.wait(lambda: len(front_end.ends) == 2)
    assert front_end.ends[1].finish_reason == "error"
    assert "256 tokens" in (front_end.ends[1].error or "")
    assert front_end.tokens[0] == generate([1, 2, 3], 20)


def test_a_front_end_that_is_gone_takes_only_its_own_requests_along(core: Core) -> None:
    lost, other = core.front_end(b"lost"), core.front_end(b"other")
    core.executor.gate.clear()
    lost.submit(0, [1], max_tokens=200)
    other.submit(0, [2], max_tokens=200)
    lost.send(Abort([77]))
    lost.peer.close()
    core.executor.open()
    other.send(Abort([]))
    other.wait(other.has_ended)
    assert other.tokens[0] == generate([2], 200)
    core.close()
    assert core.scheduler.num_unfinished == 0


def test_a_rank_that_never_answers_ends_every_request_with_the_cause() -> None:
    core = Core(step_timeout_s=0.2)
    core.executor.gate.clear()
    front_end = core.front_end(b"one")
    for request_id in range(3):
        front_end.submit(request_id, [request_id], max_tokens=5)
    front_end.wait(lambda: len(front_end.ends) == 3)
    for tokens in front_end.ends.values():
        assert tokens.finish_reason == "error"
        assert "step_timeout_s, 0.2 s" in (tokens.error or "")
    core.close()
    assert isinstance(core.error, EngineDeadError)
    assert core.scheduler.pool.num_used == 0


def test_a_message_that_cannot_be_read_harms_only_its_sender(core: Core) -> None:
    bad, good = core.front_end(b"bad"), core.front_end(b"good")
    good.submit(0, [1, 2], max_tokens=100)
    bad.peer.send(msgspec.msgpack.encode({"type": "submit", "requests": [{"id": "zero"}]}))
    bad.peer.send(b"\xc1")
    good.wait(good.has_ended)
    assert good.tokens[0] == generate([1, 2], 100)


def test_tokens_leave_while_the_ranks_keep_up(core: Core) -> None:
    front_end = core.front_end(b"one")
    front_end.submit(0, [1], max_tokens=100)
    front_end.wait(front_end.has_ended)
    assert front_end.num_messages > 20


def test_shutdown_ends_what_runs(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.submit(0, [1], max_tokens=200)
    front_end.send(Shutdown())
    front_end.wait(front_end.has_ended)
    assert front_end.ends[0].finish_reason == "error"
    assert front_end.ends[0].error == "the engine was shut down"


def test_a_profile_begins_and_ends_between_steps_and_harms_no_request(core: Core) -> None:
    runs, asks = core.front_end(b"runs"), core.front_end(b"asks")
    runs.submit(0, [1], max_tokens=150)
    runs.wait(lambda: len(runs.tokens[0]) > 3)
    assert asks.ask(StartProfile(7, "/traces")) == ProfileAnswer(7)
    assert asks.ask(StopProfile(8)) == ProfileAnswer(8, ["trace", "trace"])
    runs.wait(runs.has_ended)
    assert runs.tokens[0] == generate([1], 150)
    assert runs.profiles == []
    assert [what for what in core.executor.sent if what != "step"] == ["start", "stop"]


def test_no_step_is_sent_until_every_rank_profiles(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.gate.clear()
    front_end.send(StartProfile(0, "/traces"))
    front_end.submit(0, [1], max_tokens=3)
    front_end.send(StopProfile(1))  # refused, and so a sign that the request has been taken in
    front_end.wait(lambda: bool(front_end.profiles))
    assert front_end.profiles[0].error == "a profile is being started or stopped; wait for that to end"
    assert core.executor.sent == ["start"]
    core.executor.open()
    front_end.send(Abort([]))
    front_end.wait(front_end.has_ended)
    assert front_end.profiles[1:] == [ProfileAnswer(0)]
    assert front_end.tokens[0] == generate([1], 3)


def test_only_one_profile_runs_over_all_front_ends(core: Core) -> None:
    one, two = core.front_end(b"one"), core.front_end(b"two")
    assert one.ask(StopProfile(0)).error == "no profile runs; start one first"
    assert one.ask(StartProfile(1, "/traces")).error is None
    assert two.ask(StartProfile(1, "/others")).error == "a profile into /traces runs already; stop it first"
    assert two.ask(StopProfile(2)).error is None
    assert one.ask(StopProfile(3)).error == "no profile runs; start one first"


def test_if_one_rank_cannot_profile_none_does(core: Core) -> None:
    front_end = core.front_end(b"one")
    core.executor.fault = "disk full"
    error = "the profile cannot be written to /traces: rank 1: disk full"
    assert front_end.ask(StartProfile(0, "/traces")).error == error
    core.executor.fault = None
    assert front_end.ask(StartProfile(1, "/traces")).error is None
    core.executor.fault = "disk full"
    assert front_end.ask(StopProfile(2)).error == error
    assert front_end.ask(StopProfile(3)).error == "no profile runs; start one first"
    assert core.executor.sent == ["start", "drop", "start", "stop"]
