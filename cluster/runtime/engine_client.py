"""Starts the engine core and connects a front end to it."""

import asyncio
import atexit
import logging
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import ray
import zmq
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.core.messages import EngineOutputs, RequestMessage, Shutdown
from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.runtime.actor_calls import ActorCalls, describe, is_death
from eagleray.cluster.runtime.core_actor import CoreActor
from eagleray.cluster.runtime.core_link import PING_S, CoreLink
from eagleray.cluster.runtime.engine_info import EngineInfo
from eagleray.cluster.runtime.placement import Room, address_for, choose_device, connect, nodes_of, place
from eagleray.cluster.runtime.process_state import STOPPED, has_ended, in_words, kill_if_stopped, state_of
from eagleray.cluster.runtime.resolve import check_model
from eagleray.cluster.runtime.signals import kill
from eagleray.cluster.runtime.start_report import capacity
from eagleray.cluster.runtime.start_watch import StartWatch
from eagleray.workers.protocol.channel import milliseconds
from eagleray.workers.protocol.socket_directory import remove_left_behind, socket_place
from eagleray.workers.protocol.startup import PROCESSES, RAY, READY, OnProgress, Progress, unheard

logger = logging.getLogger(__name__)

START_MARGIN_S = 60.0  # for the core's own process, beside what its ranks may take
CLOSE_S = 3.0  # how long a closing engine may take before it is killed: ranks have two of them
MAX_NEWS = 16  # taken at once: more would keep the event loop from its other work
LAST_WORDS_S = 0.5  # how long messages of a core that has ended may still be on their way
MAX_UNHEARD = 100  # signs of news that nobody takes, before the event loop is spared them
GONE_S = 1.0  # how long a core that is ended is waited for
START_STOPPED_S = 4.0  # how long a starting core may be stopped


def nothing_else() -> None:
    """For starts that end for no other reason."""


class EngineClient:
    """Owns an engine: started with it, closed with it."""

    def __init__(self, info: EngineInfo, core: Any, room: Room, silence_limit_s: float = 120.0) -> None:
        self.info = info
        self._running = ActorCalls([core.run.remote()])
        self._dead: str | None = None
        self._closed = False
        here = ray.get_runtime_context().get_node_id() == info.node_id
        self._link = CoreLink(info.endpoint, uuid.uuid4().bytes, info.core_pid if here else None, silence_limit_s)
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = zmq.Poller()
        self._poller.register(self._link.socket, zmq.POLLIN)
        self._poller.register(self._running.fd, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self._loop: asyncio.AbstractEventLoop | None = None  # on which `areceive` waits
        self._wake = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._num_unheard = 0
        pid = info.core_pid if here else None
        self._owner = os.getpid()
        self._finalizer = weakref.finalize(  # for an owner that forgets to close
            self, _remove_if_owner, self._owner, core, room, pid
        )
        self._finalizer.atexit = False  # all finalizers of a process run where its first one was made known: after
        atexit.register(self._finalizer)  # Ray has left, if that was before Ray was imported. This runs before

    @classmethod
    def start(
        cls,
        config: EngineConfig,
        on_progress: OnProgress = unheard,
        room: Room | None = None,
        look: Callable[[], None] = nothing_else,
    ) -> "EngineClient":
        """Start an engine and wait until it is ready. `on_progress` hears each phase in this thread, "ready" last.

        Without `room` the engine reserves its own. `look` is called every second or so, and may raise what ends the
        start.

        Raises `ValueError` for a model or an option that cannot work, `EngineStartError` if the cluster has no room or
        a rank fails; then nothing is left running.
        """
        begin = time.monotonic()
        check_model(config)
        socket_place()
        on_progress(Progress(RAY))
        connect(config)
        connected = time.monotonic()
        look()
        on_progress(Progress(PROCESSES))
        device = choose_device(config)
        room = room or place(config, device, look)
        core = watch = None
        try:
            core = _create_core(room.group)
            here = nodes_of(room.group)[0] == ray.get_runtime_context().get_node_id()
            watch = _CoreWatch(core.pid.remote() if here else None, look)
            info = _start_core(core, config, device, room.group, on_progress, watch)
            on_progress(Progress(READY))
            info = _with_whole_start(info, connected - begin, time.monotonic() - begin)
            _log_start(info, config.tensor_parallel_size)
            return cls(info, core, room, max(config.step_timeout_s, 10.0))
        except BaseException as error:
            with suppress(ray.exceptions.RayError):  # of a cluster that is gone, and the engine with it
                _remove(core, room, None if watch is None else watch.pid)
            if isinstance(error, ray.exceptions.GetTimeoutError):
                raise EngineStartError("the engine core did not start in time; raise start_timeout_s") from None
            if isinstance(error, ray.exceptions.RayError):
                raise EngineStartError(describe(error)) from None
            raise

    def send(self, message: RequestMessage) -> None:
        """Hand a message to the core without waiting. Raises `EngineDeadError` if the core is known to have ended."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._link.send(message)
        self._wake.set()

    def receive(self, timeout_s: float) -> EngineOutputs | None:
        """The next news, or None once `timeout_s` is over. Raises `EngineDeadError` after a dead core's last news.

        The wait must be repeated every second or so for the core's silence to be noticed.
        """
        if self._dead is None:
            rung = dict(self._poller.poll(milliseconds(timeout_s)))
            if self._bell in rung:
                os.eventfd_read(self._bell)
        return self._take()

    def wake(self) -> None:
        """From any thread: a `receive` that waits returns now, or the next one does."""
        os.eventfd_write(self._bell, 1)

    async def areceive(self) -> list[EngineOutputs]:
        """The next news, and those that have come behind it, without blocking the event loop. Raises like `receive`.

        A socket's descriptor tells of news once, and whatever touches the socket next takes the sign away. So `send`,
        which touches it too, wakes this up to look again.
        """
        loop = asyncio.get_running_loop()
        while (news := self._take()) is None:
            self._num_unheard = 0
            if loop is not self._loop:
                self._wait_on(loop)
                continue  # what arrived meanwhile may give no sign
            self._wake.clear()
            await self._wake.wait()
        return [news, *self._more()]

    def _more(self) -> Iterator[EngineOutputs]:
        """What has arrived meanwhile. What ends the engine is raised by the next call, once these are taken."""
        try:
            for _ in range(MAX_NEWS - 1):
                if self._dead is not None or (news := self._link.receive(0)) is None:
                    return
                yield news
        except EngineDeadError as error:
            self._dead = str(error)

    def _wait_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._leave_loop()
        self._loop, self._wake = loop, asyncio.Event()
        for fd in (self._link.fd, self._running.fd):
            loop.add_reader(fd, self._ring)
        self._timer = loop.call_later(PING_S, self._tick, loop)

    def _ring(self) -> None:
        """There may be news. Descriptors say so over and over until somebody looks; if nobody does, they are left."""
        self._wake.set()
        self._num_unheard += 1
        if self._num_unheard > MAX_UNHEARD:
            self._leave_loop()

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Every second whoever waits looks whether the core lives."""
        self._ring()
        if self._loop is loop:
            self._timer = loop.call_later(PING_S, self._tick, loop)

    def _leave_loop(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for fd in (self._link.fd, self._running.fd):
                self._loop.remove_reader(fd)
            if self._timer is not None:
                self._timer.cancel()
        self._loop = None

    def _take(self) -> EngineOutputs | None:
        """News that have arrived, if any; what a core said before it ended comes before its end."""
        if self._dead is None and (ended := self._running.next(0)):
            self._dead = f"the engine core: {describe(ended[1])}" if is_death(ended[1]) else describe(ended[1])
        try:
            news = self._link.receive(0 if self._dead is None else LAST_WORDS_S)
            if self._dead is None:
                self._link.look()
        except EngineDeadError as error:
            self._dead, news = str(error), None
        if news is None and self._dead is not None:
            self._leave_loop()
            raise EngineDeadError(self._dead)
        return news

    def close(self) -> None:
        """End the engine and everything it started. Closing twice does nothing, nor does closing a forked copy."""
        if self._closed or os.getpid() != self._owner:
            return
        self._closed = True
        if self._dead is None:
            self._link.send(Shutdown())
            self._running.next(CLOSE_S)
        self._leave_loop()
        self._link.close()
        self._running.close()
        os.close(self._bell)
        atexit.unregister(self._finalizer)
        self._finalizer()


def _with_whole_start(info: EngineInfo, ray_seconds: float, total: float) -> EngineInfo:
    """The core's report, with what happened before its ranks were prepared."""
    before = {RAY: ray_seconds, PROCESSES: max(0.0, total - ray_seconds - info.seconds_prepared)}
    return msgspec.structs.replace(info, start=info.start.within(before, total))


def _log_start(info: EngineInfo, num_ranks: int) -> None:
    logger.info(
        "engine ready: %d rank%s on %s in %s, %s",
        num_ranks,
        "s" * (num_ranks > 1),
        info.device,
        info.dtype,
        capacity(info.num_blocks, info.block_size, info.start.attention),
    )
    logger.info("%s", info.start.line())
    if info.niceness > 0:
        logger.warning(
            "ranks run at nice %d, as Ray was told where it was started, and wait for other programs; "
            "set RAY_worker_niceness=0 before `ray start`",
            info.niceness,
        )


def _create_core(group: PlacementGroup) -> Any:
    """Beside rank 0, so that steps stay on the node; it takes no resources of its own."""
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    return ray.remote(max_restarts=0)(CoreActor).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _start_core(
    core: Any, config: EngineConfig, device: str, group: PlacementGroup, on_progress: OnProgress, look: "_CoreWatch"
) -> EngineInfo:
    """Raises what the core raises, and `GetTimeoutError`."""
    deadline = time.monotonic() + config.start_timeout_s + START_MARGIN_S
    watch = StartWatch(group.bundle_count, on_progress, address_for(group))
    try:
        node = ray.get_runtime_context().get_node_id()
        started = core.start.remote(config, device, group, node, watch.endpoint)
        watch.wait(ActorCalls([started]), deadline, look)
        info: EngineInfo = ray.get(started, timeout=max(0.0, deadline - time.monotonic()))
        return info
    finally:
        watch.close()


class _CoreWatch:
    """Ends a start whose core, on this node, stays stopped, or that `look` has a reason to end."""

    def __init__(self, pid: "ray.ObjectRef[int] | None", look: Callable[[], None]) -> None:
        self._ref = pid
        self._look = look
        self._pid: int | None = None
        self._ran = self._looked = time.monotonic()

    @property
    def pid(self) -> int | None:
        """The core's process, once it has said so."""
        if self._pid is None and self._ref is not None and ray.wait([self._ref], timeout=0)[0]:
            with suppress(ray.exceptions.RayError):  # it is dead
                self._pid = ray.get(self._ref, timeout=LAST_WORDS_S)
            self._ref = None
        return self._pid

    def __call__(self) -> None:
        self._look()
        now = time.monotonic()
        away, self._looked = now - self._looked > START_STOPPED_S / 2, now
        if away or (pid := self.pid) is None or state_of(pid) not in STOPPED:
            self._ran = now
        elif now - self._ran > START_STOPPED_S:
            said = f"the engine core does not start: {in_words(pid)}"
            kill_if_stopped(pid)
            raise EngineStartError(said)


def _remove_if_owner(owner: int, core: Any, room: Room, pid: int | None) -> None:
    """Nothing in a process that was forked from the owner."""
    if os.getpid() == owner:
        _remove(core, room, pid)


def _remove(core: Any, room: Room, pid: int | None = None) -> None:
    """End the core, if there is one, and see that its sockets go, too.

    `pid` is its process, if that is known and on this node.
    """
    try:
        if core is not None:
            ray.kill(core)
        if pid is not None:
            kill_if_stopped(pid)
    finally:
        room.leave()
    begin = time.monotonic()
    while pid is not None and not has_ended(pid) and (waited := time.monotonic() - begin) < 2 * GONE_S:
        if waited > GONE_S:
            kill({pid})
        time.sleep(0.01)
    remove_left_behind(min_age_s=0)
