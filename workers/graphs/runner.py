"""Owns the CUDA graphs of a rank: replays one wherever one holds the batch, and runs the model eagerly elsewhere."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.parallel.platform import platform_of
from eagleray.workers.attention.backends import DecodeBackends
from eagleray.workers.graphs.decode import DecodeGraphs, batch_sizes
from eagleray.workers.graphs.mixed import MixedGraphs, token_counts
from eagleray.workers.model_runner import ModelRunner
from eagleray.workers.protocol.config import WorkerConfig
from eagleray.workers.rows import Batch, Chunks, Rows
from eagleray.workers.sampling.plain_draw import PlainDraw
from eagleray.workers.sampling.sampler import Sampler


class GraphRunner:
    """Decodes and mixed steps of a model. Where there are no graphs, everything runs eagerly."""

    def __init__(
        self,
        runner: ModelRunner,
        rows: Rows,
        sampler: Sampler,
        config: WorkerConfig,
        decode_sizes: Sequence[int] | None = None,
    ) -> None:
        """Capture decodes of all batch sizes, or of `decode_sizes`, and mixed steps, or the largest if sizes are given.

        Without graphs, one is a call of what would be captured, if kernels run there; without kernels there are none.
        """
        self._runner, self._rows, self._sampler = runner, rows, sampler
        self._platform = platform_of(runner.device)
        self._decodes: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        sizes = batch_sizes(config.max_num_seqs) if decode_sizes is None else decode_sizes
        if not sizes or not self._platform.runs_kernels:
            return
        self._backends = DecodeBackends(
            runner.specs, runner.backends, config.max_num_seqs, config.max_model_len, runner.dtype, runner.device
        )
        if not self._can_capture([backend.capturable for backend in self._backends.of_layers]):
            return
        with torch.inference_mode():
            # one for graphs of all sizes, or each would keep its own
            self._plain = PlainDraw.buffers(
                config.max_num_seqs, len(runner.model.vocab_shard), rows.spare, runner.dtype, runner.device
            )
            self._decodes = DecodeGraphs(self._decode, rows, self._plain.rows, sizes)
            self._mixed = self._capture_mixed(config, all_sizes=decode_sizes is None)

    def _can_capture(self, capturable: Sequence[bool]) -> bool:
        return self._platform.graphs is None or all(capturable)

    def _capture_mixed(self, config: WorkerConfig, *, all_sizes: bool) -> MixedGraphs | None:
        """Graphs of every number of tokens, or only of the largest; none where attention cannot be captured."""
        counts = token_counts(config.max_num_batched_tokens)
        capturable = [backend.capturable for backend in self._backends.of_mixed_layers]
        if not counts or not self._backends.are_all or not self._can_capture(capturable):
            return None
        return MixedGraphs(
            self._forward_eagerly,
            counts if all_sizes else counts[-1:],
            max_requests=config.max_num_seqs,
            max_blocks=self._rows.max_blocks,
            max_seq_len=config.max_model_len,
            spare_slot=self._rows.spare_slot,
            device=self._runner.device,
        )

    @property
    def decode_bytes(self) -> dict[int, int]:
        """Device memory that each decode graph took, by size of batch."""
        return {} if self._decodes is None else self._decodes.num_bytes

    @property
    def has_decodes(self) -> bool:
        """Whether there are graphs of decodes."""
        return self._decodes is not None

    @property
    def has_mixed(self) -> bool:
        """Whether there are graphs of mixed steps."""
        return self._mixed is not None

    @property
    def mixed_bytes(self) -> int:
        """Device memory that the graphs of mixed steps took."""
        return 0 if self._mixed is None else self._mixed.num_bytes

    @property
    def attention(self) -> str:
        """How layers attend, in words."""
        decodes = [] if self._decodes is None else self._backends.by_spec.values()
        return " + ".join(dict.fromkeys(backend.name for backend in (*decodes, *self._runner.backends)))

    def decode(self, chunks: Chunks) -> tuple[PlainDraw, int] | None:
        """What was drawn for rows that all decode, and in how many lines; None if no graph holds them.

        Lines beyond the rows are those of the spare row. The tokens are written to their rows. The next call overwrites
        what this one returns, in the same place.
        """
        if self._decodes is None or not chunks.is_decode or not self._decodes.holds(len(chunks.rows)):
            return None
        return self._plain, self._decodes.replay(chunks.rows)

    def forward(self, batch: Batch) -> Tensor:
        """Hidden states `[tokens, hidden_size]` of a batch. The next call may overwrite them."""
        if self._mixed is not None and self._mixed.holds(batch):
            return self._mixed.replay(batch)
        return self._forward_eagerly(batch)

    # ---- what graphs capture: it waits for nothing, copies nothing from the host, and decides nothing by what rows ask

    def _decode(self, size: int) -> None:
        """Draw the next token of the first `size` rows of the buffers as for plain rows, and write it to its row."""
        plain = self._plain.of(slice(size))
        batch = self._rows.gather_decodes(plain.rows, plain.num_tokens)
        self._backends.plan(plain.num_tokens)
        hidden = self._runner.forward(batch, self._backends.of_layers)
        self._runner.model.raw_logits(hidden, out=plain.logits)
        self._sampler.draw_plain(plain)
        self._rows.advance(plain.rows, batch.positions, plain.pairs)

    def _forward_eagerly(self, batch: Batch) -> Tensor:
        if self._decodes is None:
            return self._runner.forward(batch)
        if num_single := batch.metadata.num_single:
            self._backends.plan(batch.metadata.seq_lens[:num_single])
        return self._runner.forward(batch, self._backends.of_mixed_layers)
