"""`LLM`, an engine with its blocking front end, for offline use."""

from pathlib import Path
from typing import Any

from eagleray.cluster.frontend.client import Client
from eagleray.cluster.runtime.launch import config_of, launch


class LLM(Client):
    """An engine and its front end in one; close it or use it as a context manager.

    Any number of threads may call it at once: what they ask for runs together.
    Once it is closed, whatever needs the engine raises `EngineClosedError`.
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
        """Start an engine; blocks until it is ready. `options` are `EngineConfig`'s.

        `model` is a directory, OWNER/NAME of the Hugging Face hub, or "demo"; `tokenizer` a directory or OWNER/NAME.

        With `skip_tokenizer_init` prompts are token ids and outputs have no text. Where `generate` gets no parameters,
        the model's generation_config.json counts, or nothing of it if `generation_config` is "none".
        Raises `ValueError` for what the user gave and `EngineStartError` when the cluster or a rank fails.
        """
        config = config_of(model, tensor_parallel_size, options)
        engine, front_end = launch(
            config, tokenizer, skip_tokenizer_init=skip_tokenizer_init, generation_config=generation_config
        )
        super().__init__(engine, front_end)
