"""Replicas on the cluster: how many it has room for, and each as a Ray actor with an engine of its own."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import ray

from eagleray.cluster.async_llm import AsyncLLM
from eagleray.cluster.calls import describe
from eagleray.cluster.config import EngineConfig
from eagleray.cluster.errors import EngineDeadError, EngineStartError
from eagleray.cluster.placement import choose_device, connect, rank_resources
from eagleray.deploy.batch_replica import AppReplica, engine_replica
from eagleray.deploy.batch_rows import Answer
from eagleray.deploy.batch_run import Replica
from eagleray.deploy.engine import launch_as

logger = logging.getLogger(__name__)


class ReplicaActor:
    """A replica in a process of its own, which tokenises and makes text for its engine."""

    async def start(self, config: EngineConfig, model_name: str) -> None:
        """Raises what a start of an engine raises."""
        self._llm, self._replica = await asyncio.to_thread(_start, config, model_name)

    async def answer(self, url: str, body: bytes) -> Answer:
        """As `Replica.answer`."""
        return await self._replica.answer(url, body)

    async def close(self) -> None:
        """End the engine."""
        self._llm.close()


class RemoteReplica:
    """A `ReplicaActor` from outside."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def answer(self, url: str, body: bytes) -> Answer:
        """Raises `EngineDeadError` if the engine or the actor is gone."""
        try:
            answer: Answer = await self.actor.answer.remote(url, body)
        except ray.exceptions.RayActorError as error:
            raise EngineDeadError(f"the process of a replica: {describe(error)}") from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, EngineDeadError):
                raise error.cause from None
            raise
        return answer


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
    config: EngineConfig, model_name: str, count: int, window: int
) -> AsyncIterator[Sequence[Replica]]:
    """Start so many at once. Those that fail are left out, with a warning, unless all do: then `EngineStartError`."""
    actors: list[Any] = [
        ray.remote(max_restarts=0)(ReplicaActor).options(num_cpus=0, max_concurrency=window + 2).remote()
        for _ in range(count)
    ]
    try:
        started = await asyncio.gather(
            *(actor.start.remote(config, model_name) for actor in actors), return_exceptions=True
        )
        failures = [describe(each) for each in started if isinstance(each, BaseException)]
        if len(failures) == count:
            raise EngineStartError(failures[0])
        for cause in failures:
            logger.warning("one of %d replicas did not start: %s", count, cause)
        logger.info("%d of %d replicas ready", count - len(failures), count)
        yield [RemoteReplica(actor) for actor, each in zip(actors, started, strict=True) if each is None]
        await asyncio.gather(*(actor.close.remote() for actor in actors), return_exceptions=True)
    finally:
        for actor in actors:
            ray.kill(actor)


def _start(config: EngineConfig, model_name: str) -> tuple[AsyncLLM, AppReplica]:
    engine, front_end = launch_as(config)
    llm = AsyncLLM.attach(engine, front_end)
    return llm, engine_replica(llm, engine.info, model_name)
