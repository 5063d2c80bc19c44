"""Sends steps to the ranks and hears rank 0's outputs."""

import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import msgspec
import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from eagleray.cluster.calls import DEATH_NOTICE_S, Calls
from eagleray.cluster.errors import EngineStartError
from eagleray.cluster.resolve import check_capacity
from eagleray.cluster.start_report import StartReport
from eagleray.workers.actor import RankActor
from eagleray.workers.channel import Endpoint, Hub, PeerGoneError
from eagleray.workers.config import WorkerConfig
from eagleray.workers.started import Loaded, RankHost, Ready
from eagleray.workers.wire import Goodbye, Profile, Profiled, RankMessage, RankReport, Step, StepOutput

GOODBYE_S = 2.0  # how long ranks may take to end by themselves


class RankFailedError(RuntimeError):
    """A rank is gone or stuck; the message names it and the cause."""


class Executor(Protocol):
    """What the engine core needs of its ranks."""

    num_blocks: int
    pollable: Sequence[Any]  # sockets and file descriptors that become readable when `receive` has something to say

    def send(self, message: Step | Profile) -> None:
        """Hand a message to every rank, without waiting; they take it in order. Raises `RankFailedError`."""

    def receive(self) -> StepOutput | list[Profiled] | None:
        """The next output, or all ranks' answers to a `Profile`; None if nothing is there. Raises `RankFailedError`."""

    def close(self) -> None:
        """End the ranks."""


class RayExecutor:
    """One actor per bundle of a placement group. Constructed, every rank has its share and its KV cache and waits.

    Meanwhile the ranks tell the `listener` how far they are. Raises `EngineStartError` with the failing rank's own
    error if one does not get there within `timeout_s`.
    """

    def __init__(self, config: WorkerConfig, group: PlacementGroup, *, timeout_s: float, listener: Endpoint) -> None:
        self._deadline = time.monotonic() + timeout_s
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(RankReport).decode
        self._profiled: list[Profiled] = []  # of ranks that have answered before the others
        self._names = [b"rank %d" % rank for rank in range(group.bundle_count)]
        self._ranks = _create_actors(config, group, listener)
        try:
            self.hosts: list[RankHost] = self._call("prepare")
            prepared = time.monotonic()
            loaded: list[Loaded] = self._call("load", self.hosts[0].ip, self.hosts[0].store_port)
            self.num_blocks: int = min(rank.num_blocks for rank in loaded)
            check_capacity(self.num_blocks, config)
            self._hub = self._listen()
            self._serving = Calls([rank.serve.remote(self.num_blocks, self._hub.endpoint) for rank in self._ranks])
            self.start = StartReport.of(loaded, self._await_greetings())
            self.seconds_prepared = time.monotonic() - prepared  # since all processes were there
        except BaseException:
            self._kill()
            if hasattr(self, "_hub"):
                self._hub.close()
            raise
        self.pollable: Sequence[Any] = (self._hub.socket, self._serving.fd)

    def _call(self, method: str, *args: object) -> list[Any]:
        """Call a method on every rank; the first failure ends the wait."""
        refs = [getattr(rank, method).remote(*args) for rank in self._ranks]
        calls = Calls(refs)
        for _ in refs:
            ended = calls.next(self._deadline - time.monotonic())
            if ended is None:
                raise EngineStartError(
                    f"the ranks did not finish {method!r} in time; raise start_timeout_s if they are only slow"
                )
            if ended[1] is not None:
                raise EngineStartError(calls.blame(*ended))
        return list(ray.get(refs))

    def _listen(self) -> Hub:
        here = ray.get_runtime_context().get_node_id()
        one_node = all(host.node_id == here for host in self.hosts)
        return Hub(None if one_node else ray.util.get_node_ip_address())

    def _await_greetings(self) -> list[Ready]:
        """What each rank says once it is ready. A hub can only reach a peer that it has heard of."""
        missing, ready = set(self._names), []
        while missing:
            if greeting := self._hub.receive():
                missing.discard(greeting[0])
                ready.append(msgspec.msgpack.decode(greeting[1], type=Ready))
            elif ended := self._serving.next(0.01):
                raise EngineStartError(self._serving.blame(*ended))
            elif time.monotonic() > self._deadline:
                raise EngineStartError(f"{missing.pop().decode()} did not connect to the engine core in time")
        return ready

    def send(self, message: Step | Profile) -> None:
        try:
            self._broadcast(message)
        except PeerGoneError as error:
            self._raise_failure(timeout_s=DEATH_NOTICE_S)
            raise RankFailedError(str(error)) from error

    def _broadcast(self, message: RankMessage) -> None:
        payload = self._encode(message)
        for name in self._names:
            self._hub.send(name, payload)

    def receive(self) -> StepOutput | list[Profiled] | None:
        self._raise_failure(timeout_s=0)
        while (message := self._hub.receive()) is not None:
            report = self._decode(message[1])
            if isinstance(report, StepOutput):
                return report
            self._profiled.append(report)
            if len(self._profiled) == len(self._names):
                profiled, self._profiled = self._profiled, []
                return sorted(profiled, key=lambda each: each.rank)
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


def _create_actors(config: WorkerConfig, group: PlacementGroup, listener: Endpoint) -> list[ActorHandle[Any]]:
    actor_class: Any = ray.remote(max_restarts=0, max_task_retries=0)(RankActor)
    bundles = group.bundle_specs
    return [
        actor_class.options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
        ).remote(rank, len(bundles), config, listener)
        for rank, bundle in enumerate(bundles)
    ]
