"""Draws the next token of rows and writes it to them. Decides which rows a kernel draws, and which the reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.parallel.sharding import shard_columns
from eagleray.workers.arrays import IntArray
from eagleray.workers.protocol.messages import RowStart
from eagleray.workers.rows import Chunks, Rows
from eagleray.workers.sampling.logprobs import LogprobTensors
from eagleray.workers.sampling.packed_pairs import marks_of
from eagleray.workers.sampling.reference import ReferenceSampler, SampleOutput
from eagleray.workers.sampling.table import Feature, SamplingTable

if HAS_TRITON:
    from eagleray.workers.sampling.kernel_sampler import KernelSampler
    from eagleray.workers.sampling.kernels import best_plain_pairs

LOGITS_CHUNK = 256  # prompt tokens whose logits are held at once for prompt log-probabilities


class Sampler:
    """The sampling parameters of the rows, and how each row is drawn by them.

    Where kernels run, one draws all rows as if they asked for nothing but a temperature. Others draw the rest anew, but
    for rows with very long lists, which the reference draws. Of several ranks, each gets the whole logits of those
    rows and draws all of them: the same integers are added up on each, so all come to the same tokens.
    Every rank makes the same calls in the same order. Construction is a collective call, too.
    """

    def __init__(self, model: CausalLM, rows: Rows, tp: TPGroup) -> None:
        self._model = model
        self._rows = rows
        self._tp = tp
        self._table = SamplingTable(rows.spare, model.vocab_shard, rows.tokens.device)
        self._reference = ReferenceSampler(self._table, model.vocab_shard, model.config.vocab_size, tp)
        self._draws_in_kernels = platform_of(rows.tokens.device).runs_kernels
        self._kernels: KernelSampler | None = None
        if self._draws_in_kernels:
            config = model.config
            self._kernels = KernelSampler(
                self._table, config.vocab_size, rows.spare, rows.tokens, config.final_soft_cap
            )

    def start(self, starts: Sequence[RowStart]) -> None:
        """These rows are to be drawn by these parameters."""
        samplings = {start.row: start.sampling for start in starts}
        self._table.set(samplings)
        if self._kernels is not None and samplings:
            self._kernels.set(samplings, {start.row: start.num_prompt_tokens for start in starts})

    def stop(self, rows: Sequence[int]) -> None:
        """These rows ask for nothing any more."""
        for row in rows:
            self._table.clear(row)

    def plain_pairs(self, raw_logits: Tensor, rows: Tensor, num_tokens: Tensor) -> Tensor:
        """The pair [n] of the next token of each of `rows` [n], as if it asked for nothing but a temperature.

        `raw_logits` [n, shard] are this rank's, as `CausalLM.raw_logits` gives them, and `num_tokens` [n] how many come
        before. Rows, lengths and parameters are read on the device: a CUDA graph may capture this.
        """
        table, first_id, soft_cap = self._table, self._model.vocab_shard.start, self._model.config.final_soft_cap
        pairs = best_plain_pairs(raw_logits, rows, num_tokens, table.temperatures, table.seeds, first_id, soft_cap)
        return self._tp.all_reduce(pairs, "max")

    def draw(
        self, rows: IntArray, num_tokens: IntArray, raw_logits: Tensor, pairs: Tensor | None = None
    ) -> SampleOutput:
        """The token after the first `num_tokens` [n] of each of `rows` [n], written there and counted.

        `raw_logits` [n or more, shard] are this rank's. `pairs` [n] are those of `plain_pairs`, if they are drawn and
        written already; they are changed where a row is not plain. A row may come several times, for the places of a
        draft: what is written at one of them is another token only if what is drawn at those behind it does not count.
        """
        if not self._draws_in_kernels:
            sampled = self._draw_by_reference(rows, num_tokens, self._model.finish(raw_logits))
            self._rows.append(rows, num_tokens, sampled.token_ids)
        elif pairs is not None:
            sampled = self._draw_others(rows, num_tokens, raw_logits, pairs)
        else:
            device_rows, device_num_tokens = self._rows.to_device(rows, num_tokens)
            pairs = self.plain_pairs(raw_logits, device_rows, device_num_tokens)
            sampled = self._draw_others(rows, num_tokens, raw_logits, pairs)
            self._rows.append(rows, num_tokens, sampled.token_ids)
        self._rows.count_sampled(rows)
        return sampled

    def _draw_others(self, rows: IntArray, num_tokens: IntArray, raw_logits: Tensor, pairs: Tensor) -> SampleOutput:
        """The same `pairs` [n] after those of rows that are not plain were drawn anew, there and in their rows."""
        lines = self._table.lines_not_plain(rows)
        if not len(lines):
            return SampleOutput(pairs)
        if self._kernels is None:
            return self._draw_lines_by_reference(lines, rows, num_tokens, raw_logits, pairs)
        beyond = self._kernels.beyond(rows)
        known = np.setdiff1d(lines, beyond)
        sampled = SampleOutput(pairs)
        if len(known):
            sampled = self._draw_in_kernels(self._kernels, known, rows, num_tokens, raw_logits, pairs)
        if not len(beyond):
            return sampled
        return sampled.and_then(self._draw_lines_by_reference(beyond, rows, num_tokens, raw_logits, pairs))

    def _draw_in_kernels(
        self,
        kernels: "KernelSampler",
        lines: IntArray,
        rows: IntArray,
        num_tokens: IntArray,
        raw_logits: Tensor,
        pairs: Tensor,
    ) -> SampleOutput:
        """The same `pairs` [n] after those of `lines` [m] were drawn from all ranks' logits."""
        num_lines, rows, num_tokens = len(rows), rows[lines], num_tokens[lines]
        asking = self._table.lines(rows, Feature.LOGPROBS)
        sent = self._rows.to_device(lines, rows, num_tokens, asking)
        device_lines, device_rows = sent[0].long(), sent[1].long()  # int64 as in graphs: other types are other kernels
        are_all = len(lines) == num_lines
        own = pairs if are_all else pairs[device_lines]
        whole = self._whole(raw_logits[:num_lines] if are_all else raw_logits[device_lines])
        if features := kernels.features(rows):
            kernels.redraw(whole, device_rows, sent[2], own, features, may_be_wide=kernels.may_be_wide(rows))
        if not are_all:
            pairs[device_lines] = own
        if not len(asking):
            return SampleOutput(pairs)
        logprobs = kernels.logprobs(whole, device_rows, own).of(sent[3].long())
        most = self._model.config.vocab_size
        num_logprobs = [(row, min(self._table.host[row].logprobs or 0, most)) for row in rows[asking].tolist()]
        return SampleOutput(pairs, logprobs, num_logprobs)

    def _whole(self, raw_logits: Tensor) -> Tensor:
        """The logits [n, vocab] of which each rank has its shard [n, shard]."""
        if self._tp.size == 1:
            return raw_logits
        shards = [shard_columns(self._model.config.vocab_size, rank, self._tp.size) for rank in range(self._tp.size)]
        width = max(map(len, shards))
        gathered = self._tp.all_gather(pad(raw_logits, (0, width - raw_logits.shape[1])))
        return torch.cat([logits[:, : len(shard)] for logits, shard in zip(gathered, shards, strict=True)], dim=1)

    def _draw_lines_by_reference(
        self, lines: IntArray, rows: IntArray, num_tokens: IntArray, raw_logits: Tensor, pairs: Tensor
    ) -> SampleOutput:
        """The same `pairs` [n] after those of `lines` were drawn anew, there and in their rows."""
        device_lines = self._rows.to_device(lines)[0].long()
        logits, marks = self._model.finish(raw_logits[device_lines]), marks_of(pairs[device_lines])
        sampled = self._draw_by_reference(rows[lines], num_tokens[lines], logits, marks)
        pairs[device_lines] = sampled.pairs
        self._rows.append(rows[lines], num_tokens[lines], sampled.token_ids)
        return replace(sampled, pairs=pairs)

    def _draw_by_reference(
        self, rows: IntArray, num_tokens: IntArray, logits: Tensor, marks: Tensor | None = None
    ) -> SampleOutput:
        num_prompt_tokens = self._rows.num_prompt_tokens[rows].tolist()
        return self._reference(logits, rows.tolist(), self._rows.tokens, num_prompt_tokens, num_tokens.tolist(), marks)

    def prompt_logprobs(self, chunks: Chunks, hidden: Tensor) -> dict[int, LogprobTensors]:
        """Of each prompt token whose predecessor ran with these `hidden` states [tokens, hidden], for rows that ask."""
        logprobs: dict[int, LogprobTensors] = {}
        asked = [self._table.host[row].prompt_logprobs for row in chunks.rows.tolist()]
        begins = (chunks.ends - chunks.starts).cumsum() - (chunks.ends - chunks.starts)
        for line, num_top in enumerate(asked):
            if num_top is None:
                continue
            row, start, end, begin = (int(of[line]) for of in (chunks.rows, chunks.starts, chunks.ends, begins))
            length = min(end, int(self._rows.num_prompt_tokens[row]) - 1) - start
            if length > 0:
                targets = self._rows.tokens[row, start + 1 : start + 1 + length].long()
                logprobs[row] = self._score(hidden[begin : begin + length], targets, num_top)
        return logprobs

    def _score(self, hidden: Tensor, targets: Tensor, num_top: int) -> LogprobTensors:
        """Of `targets` [n] after `hidden` [n, hidden]. Few logits are held at once."""
        parts = [
            self._reference.prompt_logprobs(self._model.logits(chunk), ids, num_top)
            for chunk, ids in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK), strict=True)
        ]
        return reduce(LogprobTensors.and_then, parts)
