"""The streaming front end for asyncio."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from eagleray.cluster.outputs import RequestOutput
from eagleray.cluster.prompts import Message, Prompt
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.cluster.tokenizer import Tokenizer


class AsyncLLM:
    """An engine and its streaming front end."""

    def __init__(
        self,
        model: str | Path,
        tensor_parallel_size: int = 1,
        tokenizer: str | Path | None = None,
        *,
        skip_tokenizer_init: bool = False,
        **options: Any,
    ) -> None:
        """As `LLM`: blocks until the engine is ready."""
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer | None:
        raise NotImplementedError

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """Yields cumulative outputs; raises `ValueError` at the first step for bad input, `EngineDeadError` at any."""
        raise NotImplementedError

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        **template_options: Any,
    ) -> AsyncIterator[RequestOutput]:
        """As `generate`, for a conversation."""
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """End a request, whose iterator yields one last output with finish_reason "abort". Unknown ids are ignored."""
        raise NotImplementedError

    def close(self) -> None:
        """End the engine; whoever waits gets `EngineDeadError`."""
        raise NotImplementedError
