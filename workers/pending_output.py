"""A step's output between its launch and its completion on the device."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from eagleray.parallel.platform import platform_of
from eagleray.workers.arrays import BoolArray, IntArray
from eagleray.workers.protocol.messages import StepOutput
from eagleray.workers.sampling.logprobs import LogprobTensors
from eagleray.workers.sampling.packed_pairs import unpack_host
from eagleray.workers.sampling.reference import SampleOutput


class PendingOutput:
    """A step that has been launched: its output, once the device has got there."""

    def __init__(
        self,
        step: int,
        device: torch.device,
        rows: IntArray,
        sampled: SampleOutput | None,
        prompt_logprobs: Mapping[int, LogprobTensors] = MappingProxyType({}),
        drafts: Mapping[int, IntArray] = MappingProxyType({}),
    ) -> None:
        """The `device` has been given the step. It is done when the device is, even if there is nothing to copy.

        `rows` are those of the sampled tokens, in their order, and of a draft's places one after the other.
        `prompt_logprobs` and `drafts` are by row.
        """
        self._output = StepOutput(step)
        self._rows = rows
        self._sampled = sampled
        self._prompt_logprobs = prompt_logprobs
        self._drafts = drafts
        self._copied: torch.Event | None = None
        if (accelerator := platform_of(device).accelerator) is not None:
            # What a graph gives lies where its next replay will write. This copy is queued before that, on the same
            # stream, into memory that is this step's own; so it is safe before `launch` returns.
            self._sampled = None if sampled is None else sampled.map(_on_its_way)
            self._prompt_logprobs = {row: each.map(_on_its_way) for row, each in prompt_logprobs.items()}
            self._copied = accelerator.Event(blocking=True)
            self._copied.record()
        elif sampled is not None:
            self._sampled = sampled.map(Tensor.clone)  # likewise, where nothing is queued

    def wait(self) -> StepOutput:
        """Sleep until the tokens are on the host. May be called from another thread."""
        if self._copied is not None:
            self._copied.synchronize()
        if self._sampled is not None:
            order = np.argsort(self._rows, kind="stable")
            token_ids, is_not_finite, is_masked = unpack_host(self._sampled.pairs.numpy()[order])
            rows = self._rows[order]
            self._output.logprobs = self._sampled.logprobs
            if self._drafts:
                counts = self._accepted(rows, token_ids, is_not_finite | is_masked)
                rows, token_ids = rows[counts], token_ids[counts]
                is_not_finite, is_masked = is_not_finite[counts], is_masked[counts]
            self._output.token_ids = token_ids.astype(np.int32).tobytes()
            self._output.not_finite = rows[is_not_finite].tolist()
            self._output.all_masked = rows[is_masked].tolist()
        for row, entries in self._prompt_logprobs.items():
            self._output.prompt_logprobs[row] = entries.to_messages()
            if row not in self._output.not_finite and not entries.logprobs.isfinite().all():
                self._output.not_finite.append(row)
        return self._output

    def _accepted(self, rows: IntArray, token_ids: IntArray, is_bad: BoolArray) -> BoolArray:
        """Which of the drawn `token_ids` [n] count: a draft's as far as it came true, and the first that differs.

        One that could not be drawn does not count, unless it is the first of its row: it comes again without a draft.
        """
        counts = np.ones(len(rows), np.bool_)
        for row, drafted in self._drafts.items():
            begin = int(np.searchsorted(rows, row))
            end = begin + 1 + len(drafted)
            is_wrong = np.append(token_ids[begin : end - 1] != drafted, True)
            num_drawn = 1 + int(is_wrong.argmax())
            if is_bad[begin : begin + num_drawn].any():
                num_drawn = max(1, int(is_bad[begin : begin + num_drawn].argmax()))
            counts[begin + num_drawn : end] = False
            self._output.num_drawn[row] = num_drawn
            if row in self._output.logprobs:
                del self._output.logprobs[row][num_drawn:]
        return counts


def _on_its_way(x: Tensor) -> Tensor:
    """A copy in page-locked memory, which is there once the device has come to it."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
