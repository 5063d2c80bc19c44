"""A batch's engine behind the server's app in this process, which can be restarted."""

import asyncio
import time
from collections.abc import Mapping

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.core.messages import MAX_PRIORITY
from eagleray.cluster.errors import EngineDeadError
from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.frontend.inputs import derive_seed
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.deploy.batch.replica import AppReplica
from eagleray.deploy.batch.rows import Answer
from eagleray.deploy.cli.engine import launch_for_tokens
from eagleray.deploy.openai.app import make_app
from eagleray.deploy.openai.served_model import ServedModel


class EngineReplica:
    """A `Replica`. Blocks until the engine is ready."""

    def __init__(self, config: EngineConfig, model_name: str, defaults: Mapping[str, float]) -> None:
        """`defaults` are of sampling. Raises what a start of an engine raises."""
        self._config, self._model_name, self._defaults = config, model_name, defaults
        self._llm, self._app = self._start()
        self._looking: asyncio.Task[None] | None = None

    async def answer(self, url: str, body: bytes, number: int) -> Answer:
        """As `Replica.answer`.

        An engine that is about to die ends its requests first, as it does those that fail alone. So after a failure
        another request finds out whether it lives.
        """
        seed = self._config.seed
        answer = await self._app.answer(url, body, None if seed is None else derive_seed(seed, number))
        if answer.status == 500:
            await asyncio.shield(self._look())
        return answer

    async def num_unfinished_tokens(self) -> int:
        """As `Replica.num_unfinished_tokens`."""
        return self._llm.num_unfinished_tokens

    def _look(self) -> "asyncio.Task[None]":
        """One look serves all that fail together."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(_check_lives(self._llm))
        return self._looking

    async def restart(self) -> None:
        """As `Replica.restart`."""
        self._llm.close()
        self._looking = None
        self._llm, self._app = await asyncio.to_thread(self._start)

    def close(self) -> None:
        """End the engine."""
        self._llm.close()

    def _start(self) -> tuple[AsyncClient, AppReplica]:
        engine, front_end = launch_for_tokens(self._config)
        llm = AsyncClient(engine, front_end)
        served = ServedModel(
            engine=llm,
            model_name=self._model_name,
            max_model_len=engine.info.max_model_len,
            created=int(time.time()),
            defaults=self._defaults,
            allow_priority=True,  # all rows are one user's
        )
        return llm, AppReplica(make_app(served))


async def _check_lives(llm: AsyncClient) -> None:
    """Raise `EngineDeadError` unless the engine makes a token."""
    params = SamplingParams(max_tokens=1, detokenize=False)
    async for output in llm.generate({"prompt_token_ids": [0]}, params, priority=-MAX_PRIORITY):
        if output.outputs[0].finish_reason == "error":
            raise EngineDeadError(f"{output.outputs[0].error}")
