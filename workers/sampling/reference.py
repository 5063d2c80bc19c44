"""The sampler in plain PyTorch, from vocabulary shards: for rows with options, for CPU, and the reference of kernels.

The order of operations is that of vLLM's v1 engine, so that the same parameters mean the same distribution; what vLLM
does not have, top-n-sigma, stands where llama.cpp has it:

 1. log-probabilities, where asked for, are of the raw logits, before anything below;
 2. `allowed_token_ids` masks every other token, `bad_words` those that would complete one of them;
 3. `stop_token_ids` are masked until `min_tokens` tokens were generated;
 4. `logit_bias` is added;
 5. penalties: repetition over prompt and output, then frequency and presence over the output;
 6. a row with a temperature below `GREEDY_BELOW` takes the arg-max, equal logits going to the lower id, and is done;
 7. top-n-sigma (arXiv:2411.07641) drops tokens whose logit is below the row's highest less `top_n_sigma` standard
    deviations of all its logits but the masked ones, as in llama.cpp: of the population, not of a sample. The cut is a
    distance in units of the deviation, so that a temperature would not move it (`top_n_sigma.py`);
 8. the logits of these rows are divided by the temperature;
 9. min-p drops tokens less likely than `min_p` times the likeliest;
10. top-k keeps the k likeliest, top-p the shortest prefix of those that holds `top_p` of their renormalised
    probability. Unlike vLLM, which keeps all tokens that equal the k-th, ties at either edge go to the lower id.
    Probability is counted in integers (`masses.py`);
11. the arg-max of logits plus Gumbel noise is a draw from the softmax (`gumbel.py`). Equal sums go to the lower id.

Where kernels run they draw instead (`kernels.py`, `kernel_sampler.py`), and keep exactly the same sets of tokens: each
operation on float32 numbers up to the last comparison of step 10 rounds once, as torch does. Only the noise may differ
in the last bits, and the logits of a model with a soft cap.

Where nothing is left to draw from, because everything is masked, the pair is a masked token's, and says so.
Where a raw logit is NaN or infinite nothing is drawn: the row's pair says so, and its token means nothing.

Ranks exchange one (value, id) pair per row, the candidates of top-k and top-p (`top_k_top_p.py`), and per-row sums and
maxima. The last exchange is a maximum over integers, so all ranks end with the same tokens whatever their rounding.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.arrays import IntArray
from eagleray.workers.pinned_copy import to_device
from eagleray.workers.protocol.messages import TokenLogprobs
from eagleray.workers.sampling.gumbel import add_gumbel_, row_keys
from eagleray.workers.sampling.logit_edits import add_bias_, allow_only_, mask_
from eagleray.workers.sampling.logprobs import LogprobTensors, token_logprobs
from eagleray.workers.sampling.packed_pairs import best_pairs, find_marks, unpack_ids
from eagleray.workers.sampling.penalties import penalise
from eagleray.workers.sampling.table import NO_TOP_K, Feature, SamplingTable
from eagleray.workers.sampling.top_k_top_p import TopKTopP, draw_top_k_top_p
from eagleray.workers.sampling.top_n_sigma import drop_below_n_sigma


@dataclass(frozen=True)
class SampleOutput:
    """One token per line, the same on every rank."""

    pairs: Tensor  # [n] int64, as in `packed_pairs.py`; they say, too, which rows nothing could be drawn for
    logprob_tensors: LogprobTensors | None = None
    num_logprobs: list[tuple[int, int]] = field(default_factory=list)  # rows that ask, line by line: for how many
    logprob_lines: IntArray | None = None  # where theirs stand among the tensors'; None if there are no others

    @property
    def token_ids(self) -> Tensor:
        """[n] int64."""
        return unpack_ids(self.pairs)

    def map(self, change: Callable[[Tensor], Tensor]) -> "SampleOutput":
        """The same with other tensors."""
        logprobs = None if self.logprob_tensors is None else self.logprob_tensors.map(change)
        return replace(self, pairs=change(self.pairs), logprob_tensors=logprobs)

    def and_then(self, others: "SampleOutput") -> "SampleOutput":
        """With log-probabilities of `others`, too, whose pairs are the same."""
        if self.logprob_tensors is None or others.logprob_tensors is None:
            return others if self.logprob_tensors is None else self
        ours, theirs = self.logprob_tensors, others.logprob_tensors
        lines = np.concatenate([self._lines(), len(ours.ranks) + others._lines()])
        return SampleOutput(self.pairs, ours.and_then(theirs), self.num_logprobs + others.num_logprobs, lines)

    @cached_property
    def logprobs(self) -> dict[int, list[TokenLogprobs]]:
        """Of the rows that ask, line by line. Read it of a copy on the host: it waits for a device."""
        found: dict[int, list[TokenLogprobs]] = {}
        if self.logprob_tensors is not None:
            asking = self.logprob_tensors.of(torch.from_numpy(self._lines()))
            messages = asking.to_messages([num_top for _, num_top in self.num_logprobs])
            for (row, _), entry in zip(self.num_logprobs, messages, strict=True):
                found.setdefault(row, []).append(entry)
        return found

    def _lines(self) -> IntArray:
        return np.arange(len(self.num_logprobs)) if self.logprob_lines is None else self.logprob_lines


@dataclass(frozen=True, slots=True)
class _Batch:
    """The lines of one call. Tensors of lines and rows exist once some row needs them."""

    rows: list[int]
    features: IntArray  # [n]
    tokens: Tensor  # [max_rows, max_len] int32
    num_prompt_tokens: list[int]
    num_tokens: list[int]

    def lines(self, wanted: int, unwanted: int = 0) -> list[int]:
        """The lines whose rows ask for all of `wanted` and none of `unwanted`."""
        chosen = (self.features & (wanted | unwanted)) == wanted
        return np.flatnonzero(chosen).tolist()


class ReferenceSampler:
    """Samples from this rank's shard; see the module's text for what is computed.

    Every rank makes the same calls in the same order. Construction is a collective call too.
    """

    def __init__(self, table: SamplingTable, vocab_shard: range, vocab_size: int, tp: TPGroup) -> None:
        self._table = table
        self._shard = vocab_shard
        self._vocab_size = vocab_size
        self._tp = tp
        width = torch.tensor(len(vocab_shard), device=table.device)
        self._max_shard = int(tp.all_reduce(width, "max"))

    def __call__(
        self,
        logits: Tensor,
        rows: list[int],
        tokens: Tensor,
        num_prompt_tokens: list[int],
        num_tokens: list[int],
        marks: Tensor | None = None,
    ) -> SampleOutput:
        """The next token of each of `rows`.

        `logits` [n, shard] float32 are this rank's, and are modified. `tokens` [max_rows, max_len] int32 holds in line
        `row` the `num_tokens` tokens before the one to be drawn, of which the first `num_prompt_tokens` are the prompt.
        `marks` [n] say which logits are not finite, if somebody has looked (`packed_pairs.py`).
        """
        if marks is None:
            marks = find_marks(logits, self._shard.start)
        features = self._table.features[rows]
        if not features.any():
            return SampleOutput(self._agree(best_pairs(logits, self._shard.start), marks))
        batch = _Batch(rows, features, tokens, num_prompt_tokens, num_tokens)
        asking = batch.lines(Feature.LOGPROBS)
        raw = logits.index_select(0, self._tensor(asking)) if asking else None
        self._edit(logits, batch)
        if lines := batch.lines(Feature.TOP_N_SIGMA):
            self._drop_below_n_sigma(logits, batch, lines)
        pairs = self._agree(self._best(logits, batch), marks)
        if raw is None:
            return SampleOutput(pairs)
        num_logprobs = [(rows[line], self._table.host[rows[line]].logprobs or 0) for line in asking]
        most = min(max(num_top for _, num_top in num_logprobs), self._vocab_size)
        asking_ids = unpack_ids(pairs[self._tensor(asking)])
        logprobs = token_logprobs(raw, asking_ids, most, self._shard, self._tp)
        return SampleOutput(pairs, logprobs, num_logprobs)

    def prompt_logprobs(self, logits: Tensor, targets: Tensor, num_top: int) -> LogprobTensors:
        """Log-probabilities of `targets` [n] int64 under raw `logits` [n, shard], and of the `num_top` likeliest."""
        return token_logprobs(logits, targets, min(num_top, self._vocab_size), self._shard, self._tp)

    def _agree(self, pairs: Tensor, marks: Tensor) -> Tensor:
        """The highest [n] of all ranks' `pairs` [n] and `marks` [n]."""
        return self._tp.all_reduce(torch.maximum(pairs, marks), "max")

    def _edit(self, logits: Tensor, batch: _Batch) -> None:
        """Masks, bias and penalties, in place."""
        table = self._table
        for line in batch.lines(Feature.ALLOWED):
            allow_only_(logits[line], table.sparse[batch.rows[line]].allowed)
        for line in batch.lines(Feature.BAD_WORDS):
            words, tokens = table.bad_words[batch.rows[line]], batch.tokens[batch.rows[line]]
            words.mask_(logits[line], tokens, batch.num_prompt_tokens[line], batch.num_tokens[line])
        for line in batch.lines(Feature.MIN_TOKENS):
            row = batch.rows[line]
            if batch.num_tokens[line] - batch.num_prompt_tokens[line] < table.host[row].min_tokens:
                mask_(logits[line], table.sparse[row].stop)
        for line in batch.lines(Feature.BIAS):
            sparse = table.sparse[batch.rows[line]]
            add_bias_(logits[line], sparse.bias_columns, sparse.bias)
        penalised = batch.lines(Feature.PENALTIES)
        if penalised:
            self._penalise(logits, batch, penalised)

    def _penalise(self, logits: Tensor, batch: _Batch, lines: list[int]) -> None:
        table = self._table
        rows = self._tensor([batch.rows[line] for line in lines])
        num_prompt_tokens = self._tensor([batch.num_prompt_tokens[line] for line in lines])
        lengths = [batch.num_tokens[line] for line in lines]
        tokens = batch.tokens[rows, : max(lengths)]
        penalties = (table.repetition[rows], table.frequency[rows], table.presence[rows])
        index = _index(self._tensor(lines), len(batch.rows))
        logits[index] = penalise(
            logits[index], tokens, num_prompt_tokens, self._tensor(lengths), penalties, self._shard
        )

    def _drop_below_n_sigma(self, logits: Tensor, batch: _Batch, lines: list[int]) -> None:
        """Top-n-sigma over all ranks' shards, in place."""
        rows = self._tensor([batch.rows[line] for line in lines])
        index = _index(self._tensor(lines), len(batch.rows))
        logits[index] = drop_below_n_sigma(logits[index], self._table.top_n_sigma[rows], self._tp)

    def _best(self, logits: Tensor, batch: _Batch) -> Tensor:
        """This rank's best pair [n] of each line, after noise where it is random."""
        greedy = batch.lines(0, unwanted=Feature.RANDOM)
        free = batch.lines(Feature.RANDOM, unwanted=Feature.RESTRICTED)
        restricted = batch.lines(Feature.RANDOM | Feature.RESTRICTED)
        best = torch.empty(len(batch.rows), dtype=torch.int64, device=logits.device)
        for lines, draw in ((greedy, self._greedy), (free, self._draw_free), (restricted, self._draw_restricted)):
            if lines:
                index = _index(self._tensor(lines), len(batch.rows))
                best[index] = draw(logits[index], batch, lines)
        return best

    def _greedy(self, logits: Tensor, batch: _Batch, lines: list[int]) -> Tensor:
        return best_pairs(logits, self._shard.start)

    def _draw_free(self, logits: Tensor, batch: _Batch, lines: list[int]) -> Tensor:
        """Draws from whole shards, less what min-p drops."""
        rows, keys = self._rows_and_keys(batch, lines)
        values = logits.div_(self._table.temperatures[rows].unsqueeze(1))
        if (batch.features[lines] & Feature.MIN_P).any():
            highest = self._tp.all_reduce(values.amax(dim=-1), "max")
            values.masked_fill_(values < (highest + self._table.log_min_p[rows]).unsqueeze(1), -torch.inf)
        return best_pairs(add_gumbel_(values, keys, self._shard.start), self._shard.start)

    def _draw_restricted(self, logits: Tensor, batch: _Batch, lines: list[int]) -> Tensor:
        rows, keys = self._rows_and_keys(batch, lines)
        table = self._table
        values = logits.div_(table.temperatures[rows].unsqueeze(1))
        max_top_k = max(table.host[batch.rows[line]].top_k or NO_TOP_K for line in lines)
        has_min_p = bool((batch.features[lines] & Feature.MIN_P).any())
        restriction = TopKTopP(table.log_min_p[rows], table.top_k[rows], table.top_p[rows], max_top_k, has_min_p)
        return draw_top_k_top_p(values, keys, restriction, self._shard, self._max_shard, self._tp)

    def _rows_and_keys(self, batch: _Batch, lines: list[int]) -> tuple[Tensor, Tensor]:
        rows = self._tensor([batch.rows[line] for line in lines])
        positions = self._tensor([batch.num_tokens[line] for line in lines])
        return rows, row_keys(self._table.seeds[rows], positions)

    def _tensor(self, values: list[int]) -> Tensor:
        return to_device(torch.tensor(values, dtype=torch.int64), self._table.device)


def _index(lines: Tensor, num_lines: int) -> Tensor | slice:
    """All lines as a slice, so that indexing them copies nothing."""
    return slice(None) if len(lines) == num_lines else lines
