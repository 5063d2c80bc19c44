"""One rank's share of a step: rows updated, model run, tokens sampled and kept in their rows."""

from array import array

import torch
from torch import Tensor

import eagleray.workers.attention  # noqa: F401  (implements the attention op)
from eagleray.models.attention import attention_layers
from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.workers.config import WorkerConfig
from eagleray.workers.context import AttentionMetadata, LayerContext, forward_context
from eagleray.workers.kv_cache import allocate_kv_cache
from eagleray.workers.rows import Batch, Rows
from eagleray.workers.sampler import Sampler
from eagleray.workers.sampling_table import SamplingTable
from eagleray.workers.wire import Step, StepOutput, TokenLogprobs

LOGITS_CHUNK = 256  # prompt tokens whose logits are held at once for prompt log-probabilities


class Worker:
    """A loaded model shard with `num_blocks` blocks of KV cache, run step by step. Knows nothing of Ray or sockets."""

    def __init__(self, config: WorkerConfig, model: CausalLM, tp: TPGroup, num_blocks: int) -> None:
        device = next(model.parameters()).device
        self._model = model
        self._forward = torch.compile(model, fullgraph=True, dynamic=True) if config.compile else model
        self._specs = [layer.spec for layer in attention_layers(model)]
        dtype = next(model.parameters()).dtype
        self._kv_caches = allocate_kv_cache(self._specs, num_blocks, config.block_size, dtype, device)
        self._rows = Rows(
            max_rows=config.max_num_seqs,
            max_len=config.max_model_len,
            block_size=config.block_size,
            device=device,
        )
        self._sampling = SamplingTable(config.max_num_seqs, model.vocab_share, device)
        self._num_steps = 0
        self._sampler = Sampler(self._sampling, model.vocab_share, model.config.vocab_size, tp)

    @torch.inference_mode()
    def run(self, step: Step) -> StepOutput:
        """Run one step. Every rank returns the same output. Raises `RuntimeError` if a step before it never came."""
        if step.step != self._num_steps + 1:
            raise RuntimeError(f"step {step.step} came after step {self._num_steps}: a message was lost")
        self._num_steps = step.step
        for row in step.stop:
            self._sampling.clear(row)
        for start in step.start:
            self._sampling.set(start.row, start.sampling)
        batch = self._rows.apply(step)
        with forward_context(self._context(batch.metadata)):
            hidden = self._forward(batch.input_ids, batch.positions)
        output = StepOutput(step.step, prompt_logprobs=self._prompt_logprobs(batch, hidden))
        if batch.sampled_rows:
            self._sample(batch, hidden, output)
        return output

    def _context(self, metadata: AttentionMetadata) -> list[LayerContext]:
        return [
            LayerContext(metadata, kv_cache, spec) for kv_cache, spec in zip(self._kv_caches, self._specs, strict=True)
        ]

    def _sample(self, batch: Batch, hidden: Tensor, output: StepOutput) -> None:
        rows = batch.sampled_rows
        sampled = self._sampler(
            self._model.logits(hidden[batch.sampled_tokens]),
            rows,
            self._rows.tokens,
            self._rows.num_prompt_tokens[rows].tolist(),
            self._rows.num_tokens[rows].tolist(),
        )
        self._rows.append(rows, sampled.token_ids)
        output.token_ids = array("i", sampled.token_ids.tolist()).tobytes()
        output.logprobs = sampled.logprobs

    def _prompt_logprobs(self, batch: Batch, hidden: Tensor) -> dict[int, list[TokenLogprobs]]:
        """Of each prompt token whose predecessor is in this batch, for the rows that ask."""
        logprobs = {}
        for index, row in enumerate(batch.rows):
            num_top = self._sampling.host[row].prompt_logprobs
            if num_top is None:
                continue
            begin, start = batch.query_start_loc[index], batch.starts[index]
            length = min(batch.query_start_loc[index + 1] - begin, int(self._rows.num_prompt_tokens[row]) - 1 - start)
            if length > 0:
                targets = self._rows.tokens[row, start + 1 : start + 1 + length].long()
                logprobs[row] = self._score(hidden[begin : begin + length], targets, num_top)
        return logprobs

    def _score(self, hidden: Tensor, targets: Tensor, num_top: int) -> list[TokenLogprobs]:
        return [
            entry
            for chunk, ids in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
            for entry in self._sampler.prompt_logprobs(self._model.logits(chunk), ids, num_top)
        ]
