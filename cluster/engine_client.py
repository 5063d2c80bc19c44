"""A front end's end of the channel to the engine core, and starting the core."""

import uuid
from typing import Any

import msgspec
import ray
import zmq
import zmq.asyncio
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eagleray.cluster.calls import Calls, describe
from eagleray.cluster.config import EngineConfig
from eagleray.cluster.core_actor import CoreActor
from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.messages import Abort, EngineInfo, EngineOutputs, Shutdown, Submit
from eagleray.cluster.placement import choose_device, connect, place
from eagleray.cluster.resolve import check_model
from eagleray.workers.channel import Peer, milliseconds

CLOSE_S = 6.0  # how long a closing engine may take before it is killed
LAST_WORDS_S = 0.5  # how long messages of a core that has ended may still be on their way


class EngineClient:
    """Owns an engine: started with it, closed with it."""

    def __init__(self, info: EngineInfo, core: Any, group: PlacementGroup) -> None:
        self.info = info
        self._core = core
        self._group = group
        self._running = Calls([core.run.remote()])
        self._dead: str | None = None
        self._closed = False
        self._peer = Peer(info.endpoint, uuid.uuid4().bytes)
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(EngineOutputs).decode
        self._poller = zmq.Poller()
        self._poller.register(self._peer.socket, zmq.POLLIN)
        self._poller.register(self._running.fd, zmq.POLLIN)
        self._async_poller: zmq.asyncio.Poller | None = None

    @classmethod
    def start(cls, config: EngineConfig) -> "EngineClient":
        """Start an engine and wait until it is ready.

        Raises `ValueError` for a model or an option that cannot work, `EngineStartError` if the cluster has no room or
        a rank fails; then nothing is left running.
        """
        check_model(config)
        connect(config)
        device = choose_device(config)
        group = place(config, device)
        core = _create_core(group)
        try:
            node = ray.get_runtime_context().get_node_id()
            info = ray.get(core.start.remote(config, device, group, node))
        except ray.exceptions.RayError as error:
            _remove(core, group)
            raise EngineStartError(describe(error)) from None
        except BaseException:
            _remove(core, group)
            raise
        return cls(info, core, group)

    def send(self, message: Submit | Abort) -> None:
        """Hand a message to the core without waiting. Raises `EngineDeadError` if the core is known to have ended."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        self._peer.send(self._encode(message))

    def receive(self, timeout_s: float | None = None) -> EngineOutputs | None:
        """The next news, or None once `timeout_s` is over. Raises `EngineDeadError` after a dead core's last news."""
        if self._dead is None and not self._poller.poll(milliseconds(timeout_s)):
            return None
        return self._take()

    async def areceive(self) -> EngineOutputs:
        """The next news, without blocking the event loop. Raises like `receive`."""
        if self._async_poller is None:
            self._async_poller = zmq.asyncio.Poller()
            self._async_poller.register(zmq.asyncio.Socket.from_socket(self._peer.socket), zmq.POLLIN)
            self._async_poller.register(self._running.fd, zmq.POLLIN)
        while (news := self._take()) is None:
            await self._async_poller.poll()
        return news

    def _take(self) -> EngineOutputs | None:
        """News that have arrived, if any; what a core said before it ended comes before its end."""
        if self._dead is None and (ended := self._running.next(0)):
            self._dead = describe(ended[1])
        payload = self._peer.receive(0 if self._dead is None else LAST_WORDS_S)
        if payload is not None:
            return self._decode(payload)
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        return None

    def close(self) -> None:
        """End the engine and everything it started. Closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._dead is None:
            self._peer.send(self._encode(Shutdown()))
            self._running.next(CLOSE_S)
        self._peer.close()
        _remove(self._core, self._group)


def _create_core(group: PlacementGroup) -> Any:
    """Beside rank 0, so that steps stay on the node; it takes no resources of its own."""
    strategy = PlacementGroupSchedulingStrategy(group, 0)
    return ray.remote(max_restarts=0)(CoreActor).options(num_cpus=0, scheduling_strategy=strategy).remote()


def _remove(core: Any, group: PlacementGroup) -> None:
    ray.kill(core)
    remove_placement_group(group)
