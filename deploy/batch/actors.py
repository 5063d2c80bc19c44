"""Batch replicas as Ray actors, each with an engine of its own, as many as the cluster has room for."""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import ray

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.runtime.actor_calls import describe
from eagleray.cluster.runtime.placement import choose_device, connect, rank_resources
from eagleray.deploy.batch.engine import EngineReplica
from eagleray.deploy.batch.rows import Answer
from eagleray.deploy.batch.run import Replica

logger = logging.getLogger(__name__)

CLOSE_S = 30.0  # an engine that closes kills what does not end by itself; one whose process is stopped cannot


class ReplicaActor:
    """A replica in a process of its own, which tokenises and makes text for its engine."""

    async def start(self, config: EngineConfig, model_name: str, defaults: Mapping[str, float]) -> None:
        """Raises what a start of an engine raises."""
        self._replica = await asyncio.to_thread(EngineReplica, config, model_name, defaults)

    async def answer(self, url: str, body: bytes, number: int) -> Answer:
        """As `Replica.answer`."""
        return await self._replica.answer(url, body, number)

    async def num_unfinished_tokens(self) -> int:
        """As `Replica.num_unfinished_tokens`."""
        return await self._replica.num_unfinished_tokens()

    async def close(self) -> None:
        """End the engine."""
        self._replica.close()


class RemoteReplica:
    """A `ReplicaActor` from outside."""

    def __init__(self, config: EngineConfig, model_name: str, defaults: Mapping[str, float], window: int) -> None:
        self._engine = (config, model_name, defaults)
        self._window = window
        self._actor = self._make()

    async def start(self) -> None:
        """Raises what a start of an engine raises, and `RayActorError`."""
        await self._actor.start.remote(*self._engine)

    async def answer(self, url: str, body: bytes, number: int) -> Answer:
        """Raises `EngineDeadError` if the engine or the actor is gone."""
        try:
            answer: Answer = await self._actor.answer.remote(url, body, number)
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError(f"the process of a replica: {describe(error)}") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineDeadError):
                raise error.cause from None
            raise
        return answer

    async def num_unfinished_tokens(self) -> int:
        """As `Replica.num_unfinished_tokens`; 0 while the actor is gone, which `answer` reports."""
        with suppress(ray.exceptions.RayError):
            count: int = await self._actor.num_unfinished_tokens.remote()
            return count
        return 0

    async def restart(self) -> None:
        """As `Replica.restart`; the actor, which may be gone, too, is replaced."""
        await self.close()
        self.kill()
        self._actor = self._make()
        try:
            await self.start()
        except ray.exceptions.RayError as error:
            raise EngineStartError(describe(error)) from None

    async def close(self) -> None:
        """End the engine; if its actor cannot, `kill` does."""
        with suppress(ray.exceptions.RayError, TimeoutError):
            await asyncio.wait_for(self._actor.close.remote(), CLOSE_S)

    def kill(self) -> None:
        """End the actor."""
        ray.kill(self._actor)

    def _make(self) -> Any:
        return ray.remote(max_restarts=0)(ReplicaActor).options(num_cpus=0, max_concurrency=self._window + 3).remote()


def choose_num_replicas(wanted: int | None, config: EngineConfig, num_rows: int) -> int:
    """As many as wanted, or as the cluster has room for now if that is None; never more than rows, and at least 1.

    Raises `EngineStartError` if the cluster cannot be reached.
    """
    most = max(num_rows, 1)
    connect(config, num_engines=min(wanted or 1, most))
    if wanted is not None:
        return min(wanted, most)
    free = ray.available_resources()
    ranks = min(int(free.get(name, 0) // each) for name, each in rank_resources(config, choose_device(config)).items())
    return max(1, min(ranks // config.tensor_parallel_size, most))


@asynccontextmanager
async def running_replicas(
    config: EngineConfig, model_name: str, defaults: Mapping[str, float], count: int, window: int
) -> AsyncIterator[Sequence[Replica]]:
    """Start so many at once. Those that fail are left out, with a warning, unless all do: then `EngineStartError`."""
    replicas = [RemoteReplica(config, model_name, defaults, window) for _ in range(count)]
    try:
        started = await asyncio.gather(*(replica.start() for replica in replicas), return_exceptions=True)
        failures = [describe(each) for each in started if isinstance(each, BaseException)]
        if len(failures) == count:
            raise EngineStartError(failures[0])
        for cause in failures:
            logger.warning("one of %d replicas did not start: %s", count, cause)
        logger.info("%d of %d replicas ready", count - len(failures), count)
        ready = [replica for replica, each in zip(replicas, started, strict=True) if each is None]
        yield ready
        await asyncio.gather(*(replica.close() for replica in ready))
    finally:
        for replica in replicas:
            replica.kill()
