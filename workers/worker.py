"""Executes one rank's part of a step: updates rows, runs the model, samples tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

import eagleray.workers.attention.op  # noqa: F401  implements the op that models call
from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import runs_triton
from eagleray.workers.attention.backends import DecodeBackends, choose_backend
from eagleray.workers.attention.context import (
    AttentionBackend,
    AttentionMetadata,
    ForwardContext,
    PagedKVLayer,
    forward_context,
)
from eagleray.workers.attention.kv_cache import KVCache
from eagleray.workers.graphs.decode import DecodeGraphs, batch_sizes
from eagleray.workers.graphs.mixed import MixedGraphs, token_counts
from eagleray.workers.pending_output import PendingOutput
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.protocol.messages import Step, StepOutput
from eagleray.workers.rows import Batch, Chunks, Rows
from eagleray.workers.sampling.reference import SampleOutput
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
        """On CUDA, graphs are captured of decode batches: of every size, or of `graph_sizes`, which may be none."""
        device, dtype = model.device, model.dtype
        self._model = model
        self._forward = torch.compile(model, fullgraph=True, dynamic=True) if config.compile else model
        self._specs = [layer.spec for layer in model.attentions]
        self._backends = [choose_backend(spec, dtype, device) for spec in self._specs]
        self._kv_cache = KVCache(self._specs, num_blocks + 1, config.block_size, dtype, device)
        self._rows = Rows(
            max_rows=config.max_num_seqs,
            max_len=config.max_model_len,
            block_size=config.block_size,
            spare_block=num_blocks,
            device=device,
            on_new_blocks=self._kv_cache.clean,
        )
        self._sampler = Sampler(model, self._rows, tp)
        self._num_steps = 0
        has_kernels = runs_triton(device)
        self._graphs: DecodeGraphs | None = None
        self._mixed_graphs: MixedGraphs | None = None
        sizes = batch_sizes(config.max_num_seqs) if graph_sizes is None else graph_sizes
        if has_kernels and sizes:
            self._decode_backends = DecodeBackends(
                self._specs, self._backends, config.max_num_seqs, config.max_model_len, dtype, device
            )
            if device.type == "cuda" and not all(backend.capturable for backend in self._decode_backends.of_layers):
                sizes = []
        if has_kernels and sizes:
            # one for graphs of all sizes, or each would keep its own
            self._decode_logits = torch.empty(config.max_num_seqs, len(model.vocab_shard), dtype=dtype, device=device)
            with torch.inference_mode():
                self._graphs = DecodeGraphs(self._decode_forward, self._rows, sizes, device)
                self._mixed_graphs = self._capture_mixed(config, all_sizes=graph_sizes is None)

    def _capture_mixed(self, config: WorkerConfig, *, all_sizes: bool) -> MixedGraphs | None:
        """Graphs of every number of tokens, or only of the largest; none where attention cannot be captured."""
        counts, device = token_counts(config.max_num_batched_tokens), self._rows.tokens.device
        if not counts or not self._decode_backends.are_all:
            return None
        if device.type == "cuda" and not all(backend.capturable for backend in self._decode_backends.of_mixed_layers):
            return None
        return MixedGraphs(
            self._mixed_forward,
            counts if all_sizes else counts[-1:],
            max_requests=config.max_num_seqs,
            max_blocks=self._rows.max_blocks,
            max_seq_len=config.max_model_len,
            spare_slot=self._rows.spare_slot,
            device=device,
        )

    @property
    def mixed_graph_bytes(self) -> int:
        """Device memory that the graphs of mixed steps took."""
        return 0 if self._mixed_graphs is None else self._mixed_graphs.num_bytes

    @property
    def graph_bytes(self) -> dict[int, int]:
        """Device memory that each decode graph took, by size of batch."""
        return {} if self._graphs is None else self._graphs.num_bytes

    @property
    def attention(self) -> str:
        """How layers attend, in words."""
        decodes = [] if self._graphs is None else self._decode_backends.by_spec.values()
        return " + ".join(dict.fromkeys(backend.name for backend in (*decodes, *self._backends)))

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
        if self._graphs is not None and chunks.is_decode:
            return PendingOutput(step.step, chunks.rows, self._decode(self._graphs, chunks), {})
        batch = self._rows.gather(chunks)
        hidden = self._run_mixed(batch)
        prompt_logprobs = self._sampler.prompt_logprobs(chunks, hidden)
        sampled = self._sample(chunks, batch, hidden) if chunks.samples.any() else None
        return PendingOutput(step.step, chunks.rows[chunks.samples], sampled, prompt_logprobs)

    def _run_mixed(self, batch: Batch) -> Tensor:
        if self._mixed_graphs is not None and self._mixed_graphs.takes(batch):
            return self._mixed_graphs.run(batch)
        return self._mixed_forward(batch)

    def _mixed_forward(self, batch: Batch) -> Tensor:
        if self._graphs is None:
            return self._run_model(batch, self._backends)
        if num_single := batch.metadata.num_single:
            self._decode_backends.plan(batch.metadata.seq_lens[:num_single])
        return self._run_model(batch, self._decode_backends.of_mixed_layers)

    def _run_model(self, batch: Batch, backends: list[AttentionBackend]) -> Tensor:
        with forward_context(self._context(batch.metadata, backends)):
            hidden: Tensor = self._forward(batch.input_ids, batch.positions)
        return hidden

    def _context(self, metadata: AttentionMetadata, backends: list[AttentionBackend]) -> ForwardContext:
        layers = zip(self._kv_cache.layers, self._model.attentions, backends, strict=True)
        return ForwardContext(
            [PagedKVLayer(metadata, cache, layer.spec, backend, layer.sinks) for cache, layer, backend in layers]
        )

    # ---- decoding, with nothing from the host but row numbers

    def _decode_forward(self, rows: Tensor) -> Tensor:
        """The pair [n] of the next token of each of `rows` [n], drawn as for plain rows and written to its row.

        Graphs capture this, so it may wait for nothing, copy nothing from the host and decide nothing by what a row
        asks. The logits stay in `_decode_logits` for rows that are not plain.
        """
        batch = self._rows.gather_decodes(rows)
        seq_lens = batch.metadata.seq_lens
        self._decode_backends.plan(seq_lens)
        hidden = self._run_model(batch, self._decode_backends.of_layers)
        logits = self._model.raw_logits(hidden, out=self._decode_logits[: len(rows)])
        pairs = self._sampler.plain_pairs(logits, rows, seq_lens)
        self._rows.advance(rows, batch.positions, pairs)
        return pairs

    def _decode(self, graphs: DecodeGraphs, chunks: Chunks) -> SampleOutput:
        return self._sampler.draw(chunks.rows, self._decode_logits, graphs.run(chunks.rows))

    # ---- any chunks

    def _sample(self, chunks: Chunks, batch: Batch, hidden: Tensor) -> SampleOutput:
        if chunks.samples.all() and len(chunks.rows) == len(hidden):
            last = hidden
        else:
            ends = batch.metadata.query_start_loc[1:].long() - 1
            last = hidden[ends if chunks.samples.all() else ends[self._sampled_lines(chunks)]]
        return self._sampler.draw(chunks.rows[chunks.samples], self._model.raw_logits(last))

    def _sampled_lines(self, chunks: Chunks) -> Tensor:
        return self._rows.to_device(chunks.samples.nonzero()[0])[0].long()
