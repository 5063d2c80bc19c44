"""`AsyncLLM`, an engine with its streaming front end, for asyncio."""

from pathlib import Path
from typing import Any

from eagleray.cluster.frontend.async_client import AsyncClient
from eagleray.cluster.runtime.launch import config_of, launch


class AsyncLLM(AsyncClient):
    """An engine and its streaming front end, used from one event loop.

    One task reads the engine's news; each request keeps only its latest state, so a slow consumer gets several steps in
    one output and memory stays bounded. Once it is closed, whatever needs the engine raises `EngineClosedError`.
    """

    def __init__(
        self,
        model: str | Path,
        tensor_parallel_size: int = 1,
        tokenizer: str | Path | None = None,
        *,
        skip_tokenizer_init: bool = False,
        generation_config: str = "auto",
        **options: Any,
    ) -> None:
        """As `LLM`: blocks until the engine is ready, and may be called before there is an event loop."""
        config = config_of(model, tensor_parallel_size, options)
        engine, front_end = launch(
            config, tokenizer, skip_tokenizer_init=skip_tokenizer_init, generation_config=generation_config
        )
        super().__init__(engine, front_end)
