"""A progress bar with throughput for `LLM.generate`."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from eagleray.cluster.frontend.request_state import RequestState


class BatchProgress:
    """Shows finished requests and tokens per second on standard error; disabled it does nothing."""

    def __init__(self, generations: list[RequestState], *, enabled: bool) -> None:
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
            console=Console(stderr=True),
            disable=not enabled,
        )
        self._task = self._bar.add_task("", total=len(generations), rates="")
        self._enabled = enabled
        self._start = time.monotonic()
        self._num_prompt_tokens = 0
        self._num_output_tokens = 0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, finished: list[RequestState]) -> None:
        """Count requests that have just ended."""
        if not self._enabled or not finished:
            return
        for generation in finished:
            self._num_prompt_tokens += len(generation.prompt_token_ids)
            self._num_output_tokens += sum(len(completion.token_ids) for completion in generation.completions)
        seconds = max(time.monotonic() - self._start, 1e-9)
        prompt, output = self._num_prompt_tokens / seconds, self._num_output_tokens / seconds
        rates = f"tokens/s: prompt {prompt:.0f}, output {output:.0f}"
        self._bar.update(self._task, advance=len(finished), rates=rates)
