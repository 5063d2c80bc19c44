"""A front end's end of the channel to the engine core, and starting the core."""

import asyncio
import logging
import time
import uuid
import weakref
from typing import Any

import msgspec
import ray
import zmq
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eagleray.cluster.calls import Calls, describe, is_death
from eagleray.cluster.config import EngineConfig
from eagleray.cluster.core_actor import CoreActor
from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.messages import EngineInfo, EngineOutputs, RequestMessage, Shutdown
from eagleray.cluster.placement import Room, address_for, choose_device, connect, place
from eagleray.cluster.resolve import check_model
from eagleray.cluster.start_report import capacity
from eagleray.cluster.start_watch import StartWatch
from eagleray.workers.channel import Peer, milliseconds
from eagleray.workers.started import PROCESSES, RAY, READY, OnProgress, Progress, unheard

logger = logging.getLogger(__name__)

START_MARGIN_S = 60.0  # for the core's own process, beside what its ranks may take
CLOSE_S = 6.0  # how long a closing engine may take before it is killed
LAST_WORDS_S = 0.5  # how long messages of a core that has ended may still be on their way


class EngineClient:
    """Owns an engine: started with it, closed with it."""

    def __init__(self, info: EngineInfo, core: Any, room: Room) -> None:
        self.info = info
        self._running = Calls([core.run.remote()])
        self._dead: str | None = None
        self._closed = False
        self._peer = Peer(info.endpoint, uuid.uuid4().bytes)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineOutputs).decode
        self._poller = zmq.Poller()
        self._poller.register(self._peer.socket, zmq.POLLIN)
        self._poller.register(self._running.fd, zmq.POLLIN)
        self._num_news = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # on which `areceive` waits
        self._wake = asyncio.Event()
        self._finalizer = weakref.finalize(self, _remove, core, room)  # for an owner that forgets to close

    @classmethod
    def start(cls, config: EngineConfig, on_progress: OnProgress = unheard, room: Room | None = None) -> "EngineClient":
        """Start an engine and wait until it is ready. `on_progress` hears each phase in this thread, "ready" last.

        Without `room` the engine reserves its own.

        Raises `ValueError` for a model or an option that cannot work, `EngineStartError` if the cluster has no room or
        a rank fails; then nothing is left running.
        """
        begin = time.monotonic()
        check_model(config)
        on_progress(Progress(RAY))
        connect(config)
        connected = time.monotonic()
        on_progress(Progress(PROCESSES))
        device = choose_device(config)
        room = room or place(config, device)
        core = _create_core(room.group)
        try:
            info = _start_core(core, config, device, room.group, on_progress)
            on_progress(Progress(READY))
        except ray.exceptions.GetTimeoutError:
            _remove(core, room)
            raise EngineStartError("the engine core did not start in time; raise start_timeout_s") from None
        except ray.exceptions.RayError as error:
            _remove(core, room)
            raise EngineStartError(describe(error)) from None
        except BaseException:
            _remove(core, room)
            raise
        info = _with_whole_start(info, connected - begin, time.monotonic() - begin)
        logger.info(
            "engine ready: %d rank%s on %s in %s, %s",
            config.tensor_parallel_size,
            "s" * (config.tensor_parallel_size > 1),
            info.device,
            info.dtype,
            capacity(info.num_blocks, info.block_size, info.start.attention),
        )
        logger.info("%s", info.start.line())
        return cls(info, core, room)

    def send(self, message: RequestMessage) -> None:
        """Hand a message to the core without waiting. Raises `EngineDeadError` if the core is known to have ended."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._peer.send(self._encode(message))
        self._wake.set()

    def receive(self, timeout_s: float | None = None) -> EngineOutputs | None:
        """The next news, or None once `timeout_s` is over. Raises `EngineDeadError` after a dead core's last news."""
        if self._dead is None and not self._poller.poll(milliseconds(timeout_s)):
            return None
        return self._take()

    async def areceive(self) -> EngineOutputs:
        """The next news, without blocking the event loop. Raises like `receive`.

        A socket's descriptor tells of news once, and whatever touches the socket next takes the sign away. So `send`,
        which touches it too, wakes this up to look again.
        """
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._wait_on(loop)
        while (news := self._take()) is None:
            self._wake.clear()
            await self._wake.wait()
        return news

    def _wait_on(self, loop: asyncio.AbstractEventLoop) -> None:
        self._leave_loop()
        self._loop, self._wake = loop, asyncio.Event()
        for fd in (self._peer.fd, self._running.fd):
            loop.add_reader(fd, self._wake.set)

    def _leave_loop(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            for fd in (self._peer.fd, self._running.fd):
                self._loop.remove_reader(fd)
        self._loop = None

    def _take(self) -> EngineOutputs | None:
        """News that have arrived, if any; what a core said before it ended comes before its end."""
        if self._dead is None and (ended := self._running.next(0)):
            self._dead = f"the engine core: {describe(ended[1])}" if is_death(ended[1]) else describe(ended[1])
        payload = self._peer.receive(0 if self._dead is None else LAST_WORDS_S)
        if payload is not None:
            return self._in_order(self._decode(payload))
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        return None

    def _in_order(self, news: EngineOutputs) -> EngineOutputs:
        self._num_news += 1
        if news.number != self._num_news:
            self._dead = "the connection to the engine core broke and news were lost"
            raise EngineDeadError(self._dead)
        return news

    def close(self) -> None:
        """End the engine and everything it started. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._dead is None:
            self._peer.send(self._encode(Shutdown()))
            self._running.next(CLOSE_S)
        self._leave_loop()
        self._peer.close()
        self._running.close()
        self._finalizer()


def _with_whole_start(info: EngineInfo, ray_seconds: float, total: float) -> EngineInfo:
    """The core's report, with what happened before its ranks were prepared."""
    before = {RAY: ray_seconds, PROCESSES: max(0.0, total - ray_seconds - info.seconds_prepared)}
    return msgspec.structs.replace(info, start=info.start.within(before, total))


def _create_core(group: PlacementGroup) -> Any:
    """Beside rank 0, so that steps stay on the node; it takes no resources of its own."""
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    return ray.remote(max_restarts=0)(CoreActor).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _start_core(
    core: Any, config: EngineConfig, device: str, group: PlacementGroup, on_progress: OnProgress
) -> EngineInfo:
    """Raises what the core raises, and `GetTimeoutError`."""
    deadline = time.monotonic() + config.start_timeout_s + START_MARGIN_S
    watch = StartWatch(group.bundle_count, on_progress, address_for(group))
    try:
        node = ray.get_runtime_context().get_node_id()
        started = core.start.remote(config, device, group, node, watch.endpoint)
        watch.wait(Calls([started]), deadline)
        info: EngineInfo = ray.get(started, timeout=max(0.0, deadline - time.monotonic()))
        return info
    finally:
        watch.close()


def _remove(core: Any, room: Room) -> None:
    ray.kill(core)
    room.leave()
