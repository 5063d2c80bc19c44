"""Executes one rank's part of a step: updates rows, runs the model, samples tokens."""

from collections.abc import Sequence

import torch

from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.workers.graphs.runner import GraphRunner
from eagleray.workers.model_runner import ModelRunner
from eagleray.workers.pending_output import PendingOutput
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import Step, StepOutput
from eagleray.workers.rows import Rows
from eagleray.workers.sampling.sampler import Sampler


class Worker:
    """A loaded model shard with `num_blocks` blocks of KV cache, run step by step. Knows nothing of Ray or sockets."""

    def __init__(
        self,
        config: WorkerConfig,
        model: CausalLM,
        tp: TPGroup,
        num_blocks: int,
        *,
        graph_sizes: Sequence[int] | None = None,
    ) -> None:
        """On CUDA, graphs of decode batches are captured: for every size, or for `graph_sizes`, which may be empty."""
        self.model_runner = ModelRunner(model, num_blocks + 1, config.block_size, compile=config.compile)
        self._model = model
        self._rows = Rows(
            max_rows=config.max_num_seqs,
            max_len=config.max_model_len,
            block_size=config.block_size,
            spare_block=num_blocks,
            device=self.model_runner.device,
            on_new_blocks=self.model_runner.kv_cache.clean,
        )
        self._sampler = Sampler(model, self._rows, tp)
        self.graphs = GraphRunner(self.model_runner, self._rows, self._sampler, config, graph_sizes)
        self._num_steps = 0

    def run(self, step: Step) -> StepOutput:
        """Run one step to its end. Every rank returns the same output."""
        return self.launch(step).wait()

    def skip(self, step: Step) -> None:
        """Count a step without running it. Raises `RuntimeError` if a step before it never came."""
        if step.step != self._num_steps + 1:
            raise RuntimeError(f"step {step.step} came after step {self._num_steps}: a message was lost")
        self._num_steps = step.step

    @torch.inference_mode()
    def launch(self, step: Step) -> PendingOutput:
        """Run one step; on CUDA, return while it still runs. Raises `RuntimeError` if a step before it never came."""
        self.skip(step)
        self._sampler.stop(step.stop)
        self._sampler.start(step.start)
        chunks = self._rows.apply(step)
        lines = self._rows.lines(chunks)
        if (decoded := self.graphs.decode(chunks)) is not None:
            sampled = self._sampler.draw_decoded(lines.rows, lines.num_tokens, *decoded)
            return PendingOutput(step.step, self.model_runner.device, lines.rows, sampled)
        hidden = self.graphs.forward(self._rows.gather(chunks))
        prompt_logprobs = self._sampler.prompt_logprobs(chunks, hidden)
        if not len(lines.rows):
            return PendingOutput(step.step, self.model_runner.device, lines.rows, None, prompt_logprobs)
        if lines.tokens is not None:
            hidden = hidden[self._rows.to_device(lines.tokens)[0].long()]
        sampled = self._sampler.draw(lines.rows, lines.num_tokens, self._model.raw_logits(hidden))
        return PendingOutput(step.step, self.model_runner.device, lines.rows, sampled, prompt_logprobs, chunks.drafts)
