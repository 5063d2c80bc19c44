"""The offline front end: a list of prompts in, a list of outputs back in the same order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from eagleray.cluster.outputs import RequestOutput
from eagleray.cluster.prompts import Message, Prompt
from eagleray.cluster.sampling_params import SamplingParams
from eagleray.cluster.tokenizer import Tokenizer


class LLM:
    """An engine and its front end in one; close it or use it as a context manager."""

    def __init__(
        self,
        model: str | Path,
        tensor_parallel_size: int = 1,
        tokenizer: str | Path | None = None,
        *,
        skip_tokenizer_init: bool = False,
        **options: Any,
    ) -> None:
        """Start an engine; blocks until it is ready. `options` are `EngineConfig`'s, `tokenizer` a directory.

        Raises `ValueError` for bad input and `EngineStartError` when the cluster or a rank fails.
        """
        raise NotImplementedError

    @property
    def tokenizer(self) -> Tokenizer | None:
        raise NotImplementedError

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs come back in the prompts' order."""
        raise NotImplementedError

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: int = 0,
    ) -> Iterator[RequestOutput]:
        """As `generate`, but yields each request's cumulative output whenever it has news. `request_id` is "0", "1", …"""
        raise NotImplementedError

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int = 0,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """As `generate`, for one conversation or several, put into text by the model's chat template."""
        raise NotImplementedError

    def close(self) -> None:
        """End the engine."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
