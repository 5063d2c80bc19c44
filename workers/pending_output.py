"""A step's output between its launch and the moment when the device has got there."""

import numpy as np
import torch

from eagleray.workers.rows import IntArray
from eagleray.workers.sampler import SampleOutput
from eagleray.workers.wire import StepOutput, TokenLogprobs


class PendingOutput:
    """A step that has been launched: its output, once the device has got there."""

    def __init__(
        self,
        step: int,
        rows: IntArray,
        sampled: SampleOutput | None,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
    ) -> None:
        """`rows` are those of the sampled tokens, in their order."""
        self._output = StepOutput(step, prompt_logprobs=prompt_logprobs)
        self._rows = rows
        self._sampled = sampled
        self._copied: torch.cuda.Event | None = None
        if sampled is not None:
            self._token_ids = sampled.token_ids
            if sampled.token_ids.is_cuda:
                # The tokens of a graph lie where its next replay will write. This copy is queued before that, on the
                # same stream, into memory that is this step's own; so they are safe before `launch` returns.
                self._token_ids = torch.empty(sampled.token_ids.shape, dtype=torch.int64, pin_memory=True)
                self._token_ids.copy_(sampled.token_ids, non_blocking=True)
                self._copied = torch.cuda.Event(blocking=True)
                self._copied.record()

    def wait(self) -> StepOutput:
        """Sleep until the tokens are on the host. May be called from another thread."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._sampled is not None:
            in_order = self._token_ids.numpy()[np.argsort(self._rows)]
            self._output.token_ids = in_order.astype(np.int32).tobytes()
            self._output.logprobs = self._sampled.logprobs
        return self._output
