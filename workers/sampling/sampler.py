"""Draws the next token of rows and writes it to them. Decides which rows a kernel draws, and which the reference."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from eagleray.models.decoder import CausalLM
from eagleray.parallel.group import TPGroup
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.workers.arrays import IntArray
from eagleray.workers.protocol.messages import RowStart
from eagleray.workers.rows import Chunks, Rows
from eagleray.workers.sampling.frequent_graphs import FrequentGraphs
from eagleray.workers.sampling.line_shares import LineShares
from eagleray.workers.sampling.logprobs import LogprobTensors
from eagleray.workers.sampling.packed_pairs import marks_of, unpack_ids
from eagleray.workers.sampling.plain_draw import PlainDraw
from eagleray.workers.sampling.reference import ReferenceSampler, SampleOutput
from eagleray.workers.sampling.table import Feature, SamplingTable

if HAS_TRITON:
    from eagleray.workers.sampling.kernel_sampler import LINES_AT_ONCE, KernelSampler
    from eagleray.workers.sampling.kernels import best_plain_pairs

LOGITS_CHUNK = 256  # prompt tokens whose logits are held at once for prompt log-probabilities


class Sampler:
    """The sampling parameters of the rows, and how each row is drawn by them.

    Where kernels run, one draws all rows as if they asked for nothing but a temperature. Others draw the rest anew, but
    for rows with very long lists, which the reference draws. Of several ranks, each gets the whole logits of a share of
    those rows, draws them, and tells the others.
    Every rank makes the same calls in the same order. Construction is a collective call, too.
    """

    def __init__(self, model: CausalLM, rows: Rows, tp: TPGroup) -> None:
        self._model = model
        self._rows = rows
        self._tp = tp
        self._table = SamplingTable(rows.spare, model.vocab_shard, rows.tokens.device)
        self._reference = ReferenceSampler(self._table, model.vocab_shard, model.config.vocab_size, tp)
        self._shares = LineShares(tp, model.config.vocab_size, rows.spare)
        self._kernels: KernelSampler | None = None  # where kernels run
        device = rows.tokens.device
        if platform_of(device).runs_kernels:
            config = model.config
            self._kernels = KernelSampler(
                self._table, config.vocab_size, rows.spare, rows.tokens, config.final_soft_cap
            )
            self._graphs = FrequentGraphs(device)
            self._static_lines = torch.zeros(_power_of_two(rows.spare), dtype=torch.int64, device=device)
            self._last_lines: IntArray = np.empty(0, np.int64)

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

    def draw_plain(self, plain: PlainDraw) -> None:
        """Draw each line's pair, the same on every rank, as if its row asked for nothing but a temperature.

        Rows, lengths and parameters are read on the device: a CUDA graph may capture this.
        """
        table, first_id, soft_cap = self._table, self._model.vocab_shard.start, self._model.config.final_soft_cap
        pairs = best_plain_pairs(
            plain.logits, plain.rows, plain.num_tokens, table.temperatures, table.seeds, first_id, soft_cap, plain.pairs
        )
        if self._tp.size > 1:
            plain.pairs.copy_(self._tp.all_reduce(pairs, "max"))

    def draw(self, rows: IntArray, num_tokens: IntArray, raw_logits: Tensor) -> SampleOutput:
        """The token after the first `num_tokens` [n] of each of `rows` [n], written there and counted.

        `raw_logits` [n, shard] are this rank's. A row may come several times, for the places of a draft: what is
        written at one of them is another token only if what is drawn at those behind it does not count.
        """
        if self._kernels is None:
            sampled = self._draw_by_reference(rows, num_tokens, self._model.finish(raw_logits))
        else:
            on_device = self._rows.to_device(rows, num_tokens)
            pairs = torch.empty(len(rows), dtype=torch.int64, device=raw_logits.device)
            # int64 as in graphs: other types are other kernels
            plain = PlainDraw(raw_logits, on_device[0].long(), on_device[1], pairs)
            self.draw_plain(plain)
            sampled = self._draw_others(self._kernels, rows, num_tokens, plain)
        self._rows.append(rows, num_tokens, sampled.token_ids)
        self._rows.count_sampled(rows)
        return sampled

    def draw_decoded(self, rows: IntArray, num_tokens: IntArray, plain: PlainDraw, num_lines: int) -> SampleOutput:
        """As `draw`, of `rows` whose tokens a decode graph has drawn as `draw_plain` does, and has written.

        `plain` always lies in the same place, and the graph filled its first `num_lines`, some of them with the spare
        row. The next call overwrites what this one returns.
        """
        assert self._kernels is not None, "without kernels there are no such graphs"
        sampled = self._draw_others(self._kernels, rows, num_tokens, plain, num_lines)
        self._rows.count_sampled(rows)
        return sampled

    def _draw_others(
        self,
        kernels: "KernelSampler",
        rows: IntArray,
        num_tokens: IntArray,
        plain: PlainDraw,
        num_lines: int | None = None,
    ) -> SampleOutput:
        """The pairs [n] after those of rows that are not plain were drawn anew, there and in their rows."""
        sampled = SampleOutput(plain.pairs[: len(rows)])
        lines = self._table.lines_not_plain(rows)
        if not len(lines):
            return sampled
        beyond = kernels.beyond(rows)
        known = np.setdiff1d(lines, beyond)
        if len(known):
            sampled = self._draw_in_kernels(kernels, known, rows, plain, num_lines)
        if not len(beyond):
            return sampled
        return sampled.and_then(self._draw_lines_by_reference(beyond, rows, num_tokens, plain))

    def _draw_in_kernels(
        self, kernels: "KernelSampler", lines: IntArray, rows: IntArray, plain: PlainDraw, num_lines: int | None
    ) -> SampleOutput:
        """The pairs [n] after those of `lines` [m] were drawn from all ranks' logits.

        With `num_lines` as `draw_decoded` says. Then the launches are replayed if they are the same in many steps: for
        the same number of lines, made up to a power of two with the spare one, and the same kernels.
        """
        asking = self._table.lines(rows[lines], Feature.LOGPROBS)
        features = kernels.features(rows[lines])
        needs = (features, kernels.may_be_wide(rows[lines]), len(asking) > 0)
        if num_lines is None:
            chosen = None if len(lines) == len(rows) else self._rows.to_device(lines)[0].long()
            logprobs = self._redraw(kernels, plain, chosen, *needs)
        elif (count := _power_of_two(len(lines))) < num_lines:
            chosen = self._fill_static_lines(lines, count, spare=len(plain.rows) - 1)
            logprobs = self._graphs.run((count, *needs), partial(self._redraw, kernels, plain, chosen, *needs))
        else:  # kernels leave plain rows alone
            chosen, whole = None, plain.of(slice(num_lines))
            logprobs = self._graphs.run((num_lines, "all", *needs), partial(self._redraw, kernels, whole, None, *needs))
        pairs = plain.pairs[: len(rows)]
        if logprobs is None:
            return SampleOutput(pairs)
        most = self._model.config.vocab_size
        num_logprobs = [(row, min(self._table.host[row].logprobs or 0, most)) for row in rows[lines[asking]].tolist()]
        return SampleOutput(pairs, logprobs, num_logprobs, lines[asking] if chosen is None else asking)

    def _redraw(
        self,
        kernels: "KernelSampler",
        plain: PlainDraw,
        lines: Tensor | None,
        features: Feature,
        may_be_wide: bool,
        with_logprobs: bool,
    ) -> LogprobTensors | None:
        """Draw `lines` [m] int64 anew, or all that `plain` has. With log-probabilities of each, if somebody asks.

        Asks nothing of the host. A slab at a time, so that whole logits take little memory.
        """
        num_lines, size = len(plain.rows if lines is None else lines), self._tp.size
        for begin in range(0, num_lines if features or size > 1 else 0, LINES_AT_ONCE * size):
            part = slice(begin, min(begin + LINES_AT_ONCE * size, num_lines))
            which = part if lines is None else lines[part]
            some = plain.of(which)
            own = self._shares.own(some)
            if features:
                kernels.redraw(own.logits, own.rows, own.num_tokens, own.pairs, features, may_be_wide=may_be_wide)
                if size > 1:
                    self._tell(own, some)
                if lines is not None:
                    plain.pairs[which] = some.pairs
            if with_logprobs and size > 1:
                kernels.logprobs(own.logits, own.rows, own.pairs, begin)
                found = kernels.found_logprobs(slice(begin, begin + len(own.rows)))
                kernels.found_logprobs(part).copy_(found.map(partial(self._shares.all, num_lines=len(some.rows))))
        if with_logprobs and size == 1:
            kernels.logprobs(plain.logits, plain.rows, plain.pairs, lines=lines)
        return kernels.found_logprobs(slice(num_lines)) if with_logprobs else None

    def _tell(self, own: PlainDraw, some: PlainDraw) -> None:
        """Write what each rank has drawn, for its share `own` of `some` lines, into their pairs and their rows."""
        some.pairs.copy_(self._shares.all(own.pairs, len(some.pairs)))
        self._rows.tokens[some.rows, some.num_tokens.long()] = unpack_ids(some.pairs).int()

    def _fill_static_lines(self, lines: IntArray, count: int, spare: int) -> Tensor:
        """The numbers of `lines`, made up to `count` with the spare one, where graphs read them."""
        if not np.array_equal(self._last_lines, lines):
            self._static_lines[: len(lines)] = self._rows.to_device(lines)[0]
            self._static_lines[len(lines) :] = spare
            self._last_lines = lines
        return self._static_lines[:count]

    def _draw_lines_by_reference(
        self, lines: IntArray, rows: IntArray, num_tokens: IntArray, plain: PlainDraw
    ) -> SampleOutput:
        """The pairs [n] after those of `lines` were drawn anew, there and in their rows."""
        device_lines = self._rows.to_device(lines)[0].long()
        logits, marks = self._model.finish(plain.logits[device_lines]), marks_of(plain.pairs[device_lines])
        sampled = self._draw_by_reference(rows[lines], num_tokens[lines], logits, marks)
        plain.pairs[device_lines] = sampled.pairs
        self._rows.append(rows[lines], num_tokens[lines], sampled.token_ids)
        return replace(sampled, pairs=plain.pairs[: len(rows)])

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


def _power_of_two(number: int) -> int:
    """The least that is not below a positive `number`."""
    return 1 << (number - 1).bit_length()
