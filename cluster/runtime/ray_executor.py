"""The executor on Ray: an actor per rank, steps to all of them, outputs from rank 0."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
import ray
import zmq
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eagleray.cluster.core.executor import LOOK_S, RankFailedError
from eagleray.cluster.core.inbox import Inbox
from eagleray.cluster.errors import EngineStartError
from eagleray.cluster.runtime.actor_calls import DEATH_NOTICE_S, ActorCalls
from eagleray.cluster.runtime.placement import nodes_of
from eagleray.cluster.runtime.resolve import check_capacity, check_memory
from eagleray.cluster.runtime.start_report import StartReport
from eagleray.cluster.runtime.vital_signs import VitalSigns
from eagleray.workers.actor import RankActor
from eagleray.workers.protocol.channel import Endpoint, Hub, PeerGoneError, milliseconds
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import (
    Beat,
    Goodbye,
    RankControl,
    RankMessage,
    RankReply,
    RankReport,
    Step,
    StepOutput,
)
from eagleray.workers.protocol.startup import Loaded, RankHost, Ready

GOODBYE_S = 2.0  # how long ranks may take to end by themselves


class RayExecutor:
    """Ranks as actors in the bundles of a placement group: a `RankSet` at a time."""

    def __init__(self, config: WorkerConfig, group: PlacementGroup, *, timeout_s: float, listener: Endpoint) -> None:
        """The `listener` is told how far ranks are that start, which they must be within `timeout_s`."""
        self._config = config
        self._group = group
        self._timeout_s = timeout_s
        self._listener = listener
        self._generation = 0
        self._ranks: RankSet | None = None

    @property
    def ranks(self) -> "RankSet":
        """Those that run. Raises `RankFailedError` if none do."""
        if self._ranks is None:
            raise RankFailedError("the ranks are stopped")
        return self._ranks

    def start(self, size: int) -> int:
        """As `Executor.start`. Raises `EngineStartError` with a failing rank's own error, or when the time is over."""
        if self._ranks is not None:
            raise RuntimeError("ranks are already running; stop them first")
        if not 1 <= size <= self._group.bundle_count:
            raise ValueError(
                f"size is {size}; the placement group has bundles for 1 to {self._group.bundle_count} ranks"
            )
        place = (self._group, size, self._generation)
        self._generation += 1
        self._ranks = RankSet(self._config, *place, timeout_s=self._timeout_s, listener=self._listener)
        return self._ranks.num_blocks

    def stop(self) -> None:
        if self._ranks is not None:
            self._ranks.close()
            self._ranks = None

    @property
    def pollable(self) -> Sequence[Any]:
        return self.ranks.pollable

    def suspects(self) -> str:
        return self.ranks.suspects()

    def send(self, message: Step | RankControl) -> None:
        self.ranks.send(message)

    def receive(self) -> StepOutput | list[RankReply] | None:
        return self.ranks.receive()


class RankSet:
    """The ranks of one start. Constructed, every rank has its shard and its KV cache and waits."""

    def __init__(
        self,
        config: WorkerConfig,
        group: PlacementGroup,
        size: int,
        generation: int,
        *,
        timeout_s: float,
        listener: Endpoint,
    ) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._replies: list[RankReply] = []  # of ranks that have answered before the others
        self._ready: dict[bytes, Ready] = {}
        self._names = [b"rank %d" % rank for rank in range(size)]
        here, nodes = ray.get_runtime_context().get_node_id(), nodes_of(group)[:size]
        self._hub = Hub(None if set(nodes) == {here} else ray.util.get_node_ip_address())
        self._inbox: Inbox[RankReport] = Inbox(self._hub, msgspec.msgpack.Decoder(RankReport).decode)
        self._signs = VitalSigns([node == here for node in nodes], time.monotonic())
        self._ranks = _create_actors(config, group, size, generation, listener, self._hub.endpoint)
        try:
            self.hosts: list[RankHost] = self._call("prepare", len(set(nodes)) == 1)
            prepared = time.monotonic()
            check_memory(self.hosts, config)
            loaded: list[Loaded] = self._call("load", self.hosts[0].store_ip, self.hosts[0].store_port)
            self.num_blocks: int = min(rank.num_blocks for rank in loaded)
            check_capacity(self.num_blocks, config)
            self._serving = ActorCalls([rank.serve.remote(self.num_blocks) for rank in self._ranks])
            self.start_report = StartReport.of(loaded, self._await_greetings())
            self.seconds_prepared = time.monotonic() - prepared  # since all processes were there
        except BaseException:
            self._kill()
            self._hub.close()
            raise
        self._signs.patient = False
        self.pollable: Sequence[Any] = (self._hub.socket, self._serving.fd)

    def _call(self, method: str, *args: object) -> list[Any]:
        """Call a method on every rank; the first failure ends the wait."""
        refs = [getattr(rank, method).remote(*args) for rank in self._ranks]
        calls = ActorCalls(refs)
        try:
            for _ in refs:
                while (ended := calls.next(0)) is None:
                    self._wait_for(calls, f"the ranks did not finish {method!r} in time")
                if ended[1] is not None:
                    raise EngineStartError(calls.blame(*ended))
        finally:
            calls.close()
        return list(ray.get(refs, timeout=max(1.0, self._deadline - time.monotonic())))

    def _await_greetings(self) -> list[Ready]:
        """What each rank says once it is ready. A hub can only reach a peer that it has heard of."""
        while missing := [name.decode() for name in self._names if name not in self._ready]:
            if ended := self._serving.next(0):
                raise EngineStartError(self._serving.blame(*ended))
            self._wait_for(self._serving, f"{missing[0]} did not connect to the engine core in time")
        return list(self._ready.values())

    def _wait_for(self, calls: ActorCalls, late: str) -> None:
        """Until a call ends, a rank says something, or `LOOK_S` is over. Raises `EngineStartError`."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise EngineStartError(f"{late}; raise start_timeout_s if they are only slow")
        poller = zmq.Poller()
        poller.register(self._hub.socket, zmq.POLLIN)
        poller.register(calls.fd, zmq.POLLIN)
        poller.poll(milliseconds(min(left, LOOK_S)))
        while self._next_report() is not None:
            pass  # nobody has been sent a step yet
        if fault := self._look():
            raise EngineStartError(fault)

    def _next_report(self) -> StepOutput | RankReply | None:
        """The next message that says more than that a rank lives or is ready."""
        while (message := self._inbox.receive()) is not None:
            name, report = message
            if isinstance(report, Beat):
                self._signs.hear(report.rank, report.pid, time.monotonic())
            elif isinstance(report, Ready):
                self._ready[name] = report
            else:
                return report
        return None

    def _look(self) -> str | None:
        """What is wrong with a rank, if it is time to ask and something is."""
        now = time.monotonic()
        return self._signs.look(now) if self._signs.is_due(now) else None

    def suspects(self) -> str:
        return self._signs.suspects()

    def send(self, message: Step | RankControl) -> None:
        if isinstance(message, RankControl):
            self._signs.patient = True
        try:
            self._broadcast(message)
        except PeerGoneError as error:
            self._raise_failure(timeout_s=DEATH_NOTICE_S)
            raise RankFailedError(str(error)) from error

    def _broadcast(self, message: RankMessage) -> None:
        payload = self._encode(message)
        for name in self._names:
            self._hub.send(name, payload)

    def receive(self) -> StepOutput | list[RankReply] | None:
        self._raise_failure(timeout_s=0)
        while (report := self._next_report()) is not None:
            if isinstance(report, StepOutput):
                return report
            self._replies.append(report)
            if len(self._replies) == len(self._names):
                replies, self._replies = self._replies, []
                self._signs.patient = False
                return sorted(replies, key=lambda each: each.rank)
        if fault := self._look():
            raise RankFailedError(fault)
        return None

    def _raise_failure(self, timeout_s: float) -> None:
        if ended := self._serving.next(timeout_s):
            raise RankFailedError(self._serving.blame(*ended))

    def close(self) -> None:
        """Let the ranks end by themselves; those that do not are killed."""
        with suppress(PeerGoneError):
            self._broadcast(Goodbye())
        deadline = time.monotonic() + GOODBYE_S
        for _ in self._names:
            if self._serving.next(deadline - time.monotonic()) is None:
                break
        self._kill()
        self._serving.close()
        self._hub.close()

    def _kill(self) -> None:
        for rank in self._ranks:
            ray.kill(rank)
        self._signs.kill_stopped()


def _create_actors(
    config: WorkerConfig, group: PlacementGroup, size: int, generation: int, listener: Endpoint, hub: Endpoint
) -> list[ActorHandle[Any]]:
    actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
    bundles = group.bundle_specs[:size]
    return [
        actor_class.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        ).remote(rank, size, generation, config, listener, hub)
        for rank, bundle in enumerate(bundles)
    ]
