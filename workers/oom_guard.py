"""Skips steps that run out of memory, with those already sent after them, as if they had never come.

By the time the engine core hears of such a step, it has sent the next ones, which build on it. So the rank skips them
all; the first step of the core's fresh start says so, and every row is started anew with it.
"""

import msgspec
import torch

from eagleray.workers.out_of_memory import explain, is_out_of_memory, release_unused
from eagleray.workers.output_sender import Pending
from eagleray.workers.protocol.messages import Step, StepOutput
from eagleray.workers.worker import Worker

REMEDY = (
    "lower gpu_memory_utilization or kv_cache_bytes, which leaves steps more room, lower max_num_batched_tokens or "
    "max_num_seqs, or end what else runs on this device"
)


class Skipped:
    """The output of a step that did not run."""

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def wait(self) -> StepOutput:
        return self._output


class OomGuard:
    """Runs a worker's steps. Only a rank that is alone can leave one out: others would wait for it in their sums."""

    def __init__(self, worker: Worker, *, max_rows: int, alone: bool, device: torch.device) -> None:
        self._worker = worker
        self._every_row = list(range(max_rows))
        self._alone = alone
        self._device = device
        self._skipping = False

    def run(self, step: Step) -> StepOutput:
        """Run one step to its end."""
        return self.launch(step).wait()

    def launch(self, step: Step) -> Pending:
        """As `Worker.launch`. Raises `MemoryError` if a step among several ranks runs out of memory."""
        if step.restart:
            self._skipping = False
            step = msgspec.structs.replace(step, stop=self._every_row)
        if self._skipping:
            self._worker.skip(step)
            return Skipped(StepOutput(step.step))
        try:
            return self._worker.launch(step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            failure = explain(error, "a step", REMEDY, self._device)
            if not self._alone:
                raise MemoryError(failure) from error
        self._skipping = True
        release_unused(self._device)
        return Skipped(StepOutput(step.step, out_of_memory=failure))
