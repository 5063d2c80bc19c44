"""A step's output between its launch and its completion on the device."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from eagleray.workers.protocol.messages import StepOutput
from eagleray.workers.rows import IntArray
from eagleray.workers.sampling.logprobs import LogprobTensors
from eagleray.workers.sampling.packed_pairs import unpack_host
from eagleray.workers.sampling.reference import SampleOutput


class PendingOutput:
    """A step that has been launched: its output, once the device has got there."""

    def __init__(
        self,
        step: int,
        rows: IntArray,
        sampled: SampleOutput | None,
        prompt_logprobs: Mapping[int, LogprobTensors],
    ) -> None:
        """`rows` are those of the sampled tokens, in their order; `prompt_logprobs` are by row."""
        self._output = StepOutput(step)
        self._rows = rows
        self._sampled = sampled
        self._prompt_logprobs = prompt_logprobs
        self._copied: torch.cuda.Event | None = None
        results = [*([] if sampled is None else [sampled.pairs]), *(each.ranks for each in prompt_logprobs.values())]
        if any(tensor.is_cuda for tensor in results):
            # What a graph gives lies where its next replay will write. This copy is queued before that, on the same
            # stream, into memory that is this step's own; so it is safe before `launch` returns.
            self._sampled = None if sampled is None else sampled.map(_on_its_way)
            self._prompt_logprobs = {row: each.map(_on_its_way) for row, each in prompt_logprobs.items()}
            self._copied = torch.cuda.Event(blocking=True)
            self._copied.record()

    def wait(self) -> StepOutput:
        """Sleep until the tokens are on the host. May be called from another thread."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._sampled is not None:
            order = np.argsort(self._rows)
            token_ids, is_not_finite, is_masked = unpack_host(self._sampled.pairs.numpy()[order])
            self._output.token_ids = token_ids.astype(np.int32).tobytes()
            self._output.logprobs = self._sampled.logprobs
            self._output.not_finite = self._rows[order][is_not_finite].tolist()
            self._output.all_masked = self._rows[order][is_masked].tolist()
        for row, entries in self._prompt_logprobs.items():
            self._output.prompt_logprobs[row] = entries.to_wire()
            if row not in self._output.not_finite and not entries.logprobs.isfinite().all():
                self._output.not_finite.append(row)
        return self._output


def _on_its_way(x: Tensor) -> Tensor:
    """A copy in page-locked memory, which is there once the device has come to it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
