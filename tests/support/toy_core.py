"""The engine core's loop in a thread, with real sockets and a toy rank, and a front end's side of the channel."""

import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from eagleray.cluster.core.engine_core import EngineCore
from eagleray.cluster.core.messages import (
    Control,
    ControlReply,
    EngineOutputs,
    EngineRequest,
    FrontEndMessage,
    Ping,
    Shutdown,
    Submit,
    Tokens,
)
from eagleray.cluster.core.request_check import EngineLimits
from eagleray.cluster.core.scheduler import Scheduler
from eagleray.cluster.errors import EngineDeadError
from eagleray.workers.protocol.channel import Hub, Peer
from eagleray.workers.protocol.messages import RankControl, RankReply, Sampling, Step, StepOutput
from support.toy_rank import VOCAB_SIZE, ToyRank

NUM_BLOCKS, BLOCK_SIZE = 64, 4
LIMITS = EngineLimits(vocab_size=VOCAB_SIZE, max_model_len=400)


class ToyExecutor:
    """Runs each step when its output is asked for; `gate` holds outputs back."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.pollable: Sequence[Any] = (self._fd,)
        self._rank = ToyRank(NUM_BLOCKS, BLOCK_SIZE)
        self._messages: deque[Step | RankControl] = deque()
        self.sent: list[str] = []  # step, or what a profile is to do
        self.seconds = 0.0  # that a step is said to take
        self.steps: list[Step] = []
        self.fault: str | None = None  # why the second of two ranks cannot profile

    def send(self, message: Step | RankControl) -> None:
        self.sent.append("step" if isinstance(message, Step) else message.verb)
        self._messages.append(message)
        os.eventfd_write(self._fd, 1)

    def receive(self) -> StepOutput | list[RankReply] | None:
        if not self._messages or not self.gate.is_set():
            return None
        message = self._messages.popleft()
        if not self._messages:
            os.eventfd_read(self._fd)
        if isinstance(message, Step):
            self.steps.append(message)
            return msgspec.structs.replace(self._rank.run(message), gpu_seconds=self.seconds)
        file = "trace" if message.verb == "stop_profile" else ""
        fault = None if message.verb == "drop_profile" else self.fault
        return [RankReply(0, file), RankReply(1, file, fault)]

    def suspects(self) -> str:
        return ""

    def open(self) -> None:
        self.gate.set()

    def start(self, size: int) -> int:
        return NUM_BLOCKS

    def stop(self) -> None:
        self.closed = True


class FrontEnd:
    """A front end's side of the channel."""

    def __init__(self, hub: Hub, name: bytes) -> None:
        self.peer = Peer(hub.endpoint, name)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Tokens] = {}
        self.replies: list[ControlReply] = []
        self.num_messages = 0
        self._num_sent = 0
        self._num_answers = 0

    def send(self, message: FrontEndMessage) -> None:
        self._num_sent += 1
        self.peer.send(msgspec.msgpack.encode(message))

    def submit(self, request_id: int, prompt: list[int], max_tokens: int = 8) -> None:
        token_ids = array("i", prompt).tobytes()
        self.send(Submit([EngineRequest(request_id, token_ids, Sampling(), max_tokens)]))
        self.tokens[request_id] = []

    def ask(self, message: Control) -> ControlReply:
        before = len(self.replies)
        self.send(message)
        self.wait(lambda: len(self.replies) > before)
        assert self.replies[-1].id == message.id
        return self.replies[-1]

    def wait_for_answer(self) -> None:
        """Until the core has taken all that was sent before."""
        before = self._num_answers
        self.send(Ping(self._num_sent + 1))
        self.wait(lambda: self._num_answers > before)

    def has_ended(self) -> bool:
        return bool(self.ends)

    def wait(self, done: Callable[[], bool]) -> None:
        while not done():
            payload = self.peer.receive(10)
            assert payload is not None, "no news for ten seconds"
            news = msgspec.msgpack.decode(payload, type=EngineOutputs)
            self.num_messages += 1
            assert news.number == self.num_messages
            assert news.lost == ""
            self.replies += news.replies
            self._num_answers += not news.outputs and not news.replies
            for tokens in news.outputs:
                self.tokens[tokens.id] += tokens.token_ids
                if tokens.finish_reason:
                    assert tokens.id not in self.ends, "a request ended twice"
                    self.ends[tokens.id] = tokens


class Core:
    """An engine core that runs in a thread."""

    def __init__(self, step_timeout_s: float = 30.0, hub: Hub | None = None) -> None:
        self.hub = hub or Hub()
        self.executor = ToyExecutor()
        self.scheduler = Scheduler(
            num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_num_seqs=8, max_num_batched_tokens=64
        )
        core = EngineCore(
            self.scheduler, self.executor, self.hub, LIMITS, steps_in_flight=2, step_timeout_s=step_timeout_s
        )
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
