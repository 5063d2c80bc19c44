"""The engine core's loop: requests in from front ends, steps out to the ranks, tokens back."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable

import msgspec
import zmq

from eagleray.cluster.core.control import Controls
from eagleray.cluster.core.executor import LOOK_S, Executor, RankFailedError
from eagleray.cluster.core.inbox import Inbox
from eagleray.cluster.core.messages import (
    Abort,
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
from eagleray.cluster.core.request import FrontEndId
from eagleray.cluster.core.request_check import EngineLimits, check_request
from eagleray.cluster.core.scheduler import News, Scheduler
from eagleray.cluster.errors import EngineDeadError
from eagleray.workers.protocol.channel import Hub, PeerGoneError, milliseconds
from eagleray.workers.protocol.messages import StepOutput

logger = logging.getLogger(__name__)

LOOK_EVERY = 16  # messages, whether it is time for a step
MAX_MESSAGES = 1000  # of front ends in one turn, so that a flood leaves time for steps


class EngineCore:
    """Owns the scheduler. While a step runs, the next is scheduled and sent, up to `steps_in_flight` of them.

    Not at once: a step that is scheduled just before the ranks need it has in it who arrived meanwhile.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        front_ends: Hub,
        limits: EngineLimits,
        *,
        steps_in_flight: int,
        step_timeout_s: float,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._front_ends = front_ends
        self._inbox = Inbox(front_ends, msgspec.msgpack.Decoder(FrontEndMessage).decode)
        self._limits = limits
        self._steps_in_flight = steps_in_flight
        self._step_timeout_s = step_timeout_s
        self._step_due = 0.0  # when the oldest step in flight is late
        self._next_at = 0.0  # when the next step is to be scheduled, as was last known
        self._num_heard: dict[FrontEndId, int] = defaultdict(int)
        self._pinged: dict[FrontEndId, str] = {}  # front ends that wait for a sign, and what was lost of theirs
        self._num_refused = 0
        self._num_news: dict[FrontEndId, int] = defaultdict(int)
        self._news: dict[FrontEndId, list[Tokens]] = defaultdict(list)
        self._controls = Controls(executor.send)
        self._replies: dict[FrontEndId, list[ControlReply]] = defaultdict(list)
        self._stopping = False
        self._encode = msgspec.msgpack.Encoder().encode
        self._poller = zmq.Poller()
        for source in (front_ends.socket, *executor.pollable):
            self._poller.register(source, zmq.POLLIN)

    def run(self) -> None:
        """Serve until shutdown. When a rank fails, end every request with that and raise `EngineDeadError`."""
        try:
            while not self._stopping:
                self.turn()
            self._tell(self._scheduler.fail("the engine was shut down"))
            self._send_news()
        except RankFailedError as error:
            logger.error("%s", error)
            self._tell(self._scheduler.fail(str(error)))
            self._send_news()
            raise EngineDeadError(str(error)) from None
        finally:
            self._executor.stop()
            self._front_ends.close()

    def turn(self) -> None:
        """Take what has arrived; then send a step, or wait until there is something to do."""
        self._take_messages()
        self._take_output()
        while self._send_step():
            pass  # what keeps the ranks busy goes first
        self._send_news()
        if not self._stopping:
            begin = time.monotonic()
            self._wait()
            self._scheduler.clock.send_or_sleep(time.monotonic() - begin)

    def _take_messages(self) -> None:
        for number in range(1, 1 + MAX_MESSAGES):
            if (received := self._inbox.receive()) is None:
                return
            self._num_heard[received[0]] += 1
            self._handle(*received)
            if number % LOOK_EVERY == 0 and self._scheduler.num_in_flight and self._may_send():
                return  # a flood of requests does not keep the ranks waiting

    def _handle(self, front_end: FrontEndId, message: FrontEndMessage) -> None:
        match message:
            case Submit(requests):
                for request in requests:
                    self._add(front_end, request)
            case Abort(ids):
                ended = (self._scheduler.abort(front_end, request_id) for request_id in ids)
                self._tell((front_end, tokens) for tokens in ended if tokens is not None)
            case Control():
                if (reply := self._controls.ask(front_end, message)) is not None:
                    self._replies[front_end].append(reply)
            case Ping(num_sent):
                heard = self._num_heard[front_end]
                self._pinged[front_end] = "" if heard == num_sent else f"{num_sent - heard} of {num_sent} messages"
            case Shutdown():
                self._stopping = True

    def _add(self, front_end: FrontEndId, request: EngineRequest) -> None:
        """Hand a request to the scheduler; one that cannot run ends with an error. One that runs is not added again."""
        if any(self._scheduler.knows(front_end, request.id + index) for index in range(1 + len(request.seeds))):
            self._num_refused += 1
            if self._num_refused == 1:
                logger.error("a front end sends request %d again; it and further ones are dropped", request.id)
            return
        try:
            check_request(request, self._limits)
            self._scheduler.add(front_end, request)
        except ValueError as error:
            ids = range(request.id, request.id + 1 + len(request.seeds))
            self._tell((front_end, Tokens(each, finish_reason="error", error=str(error))) for each in ids)

    def _take_output(self) -> None:
        while (report := self._executor.receive()) is not None:
            if isinstance(report, StepOutput):
                self._tell(self._scheduler.update(report))
            elif (reply := self._controls.collect(report)) is not None:
                self._replies[reply[0]].append(reply[1])
            self._step_due = time.monotonic() + self._step_timeout_s

    def _send_step(self) -> bool:
        in_flight = self._scheduler.num_in_flight
        if not self._may_send():
            return False
        step = self._scheduler.schedule()
        if step is None:
            return False
        if in_flight == 0:
            self._step_due = time.monotonic() + self._step_timeout_s
        begin = time.monotonic()
        self._executor.send(step)
        self._scheduler.clock.send_or_sleep(time.monotonic() - begin)
        return True

    def _may_send(self) -> bool:
        """Whether the ranks may soon have nothing to do, and take another step."""
        if self._scheduler.num_in_flight >= self._steps_in_flight or self._controls.waits:
            return False
        self._next_at = self._scheduler.due
        return self._next_at <= time.monotonic()

    def _wait(self) -> None:
        """Sleep until something arrives, or it is time for the next step, or to look after the ranks, which
        `Executor.receive` does.

        If a step is in flight, no longer than it may take. A control takes as long as it takes.
        """
        left = LOOK_S
        if self._scheduler.num_in_flight and not self._controls.waits:
            left = min(LOOK_S, self._step_due - time.monotonic())
        if left <= 0:
            reason = self._executor.suspects() or "a rank hangs, or the limit is too low for this machine"
            raise RankFailedError(
                f"a step's output did not come within step_timeout_s, {self._step_timeout_s:g} s: {reason}"
            )
        if (early := self._next_at - time.monotonic()) > 0:
            left = min(left, early)
        self._poller.poll(milliseconds(left))

    def _tell(self, news: Iterable[News]) -> None:
        for front_end, tokens in news:
            self._news[front_end].append(tokens)

    def _send_news(self) -> None:
        if not self._news and not self._replies and not self._pinged:
            return
        news, self._news = self._news, defaultdict(list)
        pinged, self._pinged = self._pinged, {}
        replies, self._replies = self._replies, defaultdict(list)
        stats = self._scheduler.stats()
        for front_end in news.keys() | replies.keys() | pinged.keys():
            self._num_news[front_end] += 1  # even if it does not arrive, so that it is missed
            message = EngineOutputs(
                news[front_end], stats, self._num_news[front_end], replies[front_end], pinged.get(front_end, "")
            )
            try:
                self._front_ends.send(front_end, self._encode(message))
            except PeerGoneError:
                logger.warning("a front end is gone; its requests are aborted")
                self._scheduler.abort_front_end(front_end)
