"""Draws rows with any options in kernels: no sort of the vocabulary, no wait of the host, no copy from it in a step.

The kernels stand in `redraw/`; what they compute is said in `reference.py`, and they keep exactly the same sets of
tokens. Only logarithms and exponentials may differ from torch's in the last bits: those of the noise, of a soft cap, of
log-probabilities.
"""

from collections.abc import Mapping

import numpy as np
import torch
import triton
from torch import Tensor

from eagleray.parallel.platform import OVERLAP
from eagleray.workers.arrays import IntArray
from eagleray.workers.protocol.messages import MAX_LOGPROBS, Sampling
from eagleray.workers.sampling.logprobs import LogprobTensors
from eagleray.workers.sampling.masses import MAX_VOCAB
from eagleray.workers.sampling.redraw.arithmetic import EXACT
from eagleray.workers.sampling.redraw.draw_kernels import collect_kernel, finish_kernel, survey_kernel
from eagleray.workers.sampling.redraw.edit_kernels import dense_kernel, sparse_kernel
from eagleray.workers.sampling.redraw.fields import NUM_STATES
from eagleray.workers.sampling.redraw.logprob_kernel import logprob_kernel
from eagleray.workers.sampling.redraw.narrow_kernels import begin_kernel, gather_kernel, narrow_kernel
from eagleray.workers.sampling.redraw.penalty_kernels import count_kernel, penalise_kernel
from eagleray.workers.sampling.redraw.row_lists import RowLists, asks_for_redraw
from eagleray.workers.sampling.redraw.sigma_kernel import top_n_sigma_kernel
from eagleray.workers.sampling.table import Feature, SamplingTable

LINES_AT_ONCE = 64  # more come one slab after another, in the same memory, which is about a large L2 cache
SCORED_AT_ONCE = 1024  # lines whose log-probabilities are found: a program each, which takes as long for one as for 200
LANES = 2048  # of the survey of a line
CAPACITY = 2048  # candidates of a line
FEW = 512  # of these, for log-probabilities
SURVEY_WIDTH, SURVEY_DEPTH = 128, 8
TILE, WALK_TILE, PIVOTS = 1024, 1024, 8
ROUNDS, NARROW_PIVOTS = 4, 8  # of the search for the cut of a wide nucleus
TOKENS_AT_ONCE, PARTS = 256, 8  # of a row's tokens, for penalties
ENOUGH_PROGRAMS = 1024

_EDITED_SPARSELY = Feature.MIN_TOKENS | Feature.BIAS | Feature.BAD_WORDS
_SURVEYED = Feature.RESTRICTED | Feature.MIN_P
_KINDS = (_EDITED_SPARSELY, Feature.PENALTIES, Feature.TOP_N_SIGMA, Feature.RESTRICTED, Feature.MIN_P)
ANY = Feature(sum(Feature))


class KernelSampler:
    """Draws lines of whole vocabularies for rows of `table`.

    It takes 8 bytes for each token of the vocabulary in each of up to `LINES_AT_ONCE` lines, and 25 KB a line: 79 MB
    for 64 lines of 152 thousand tokens. Log-probabilities take 4 KB for each of up to `SCORED_AT_ONCE` lines.
    `RowLists` takes 23 KB a row beside that.
    """

    def __init__(
        self, table: SamplingTable, vocab_size: int, max_rows: int, tokens: Tensor, soft_cap: float | None = None
    ) -> None:
        """`tokens` [max_rows + 1, max_len] int32 are those of all rows; the last is the spare one.

        With `soft_cap`, raw logits are first bent to `soft_cap * tanh(logit / soft_cap)`.
        """
        assert vocab_size <= MAX_VOCAB
        assert tokens.shape[0] == max_rows + 1
        device = tokens.device
        self._table = table
        self._vocab_size = vocab_size
        self._tokens = tokens
        self._soft_cap = soft_cap
        self.lists = RowLists(max_rows, vocab_size, device)
        lines = min(max_rows, LINES_AT_ONCE)
        self._work = torch.empty(lines, vocab_size, device=device)
        self._token_counts = torch.zeros(lines, vocab_size, dtype=torch.int32, device=device)  # empty between steps
        self._survey = torch.empty(lines, LANES, dtype=torch.int32, device=device)
        self._candidates = torch.empty(lines, CAPACITY, dtype=torch.int64, device=device)
        self._num_candidates = torch.empty(lines, dtype=torch.int32, device=device)
        self._likeliest = torch.empty(
            min(max_rows, SCORED_AT_ONCE), min(FEW, CAPACITY), dtype=torch.int64, device=device
        )
        self._logprob_ids = torch.empty(max_rows, 1 + MAX_LOGPROBS, dtype=torch.int64, device=device)
        self._logprobs = torch.empty(max_rows, 1 + MAX_LOGPROBS, device=device)
        self._ranks = torch.empty(max_rows, dtype=torch.int64, device=device)
        self._masses, self._best, self.cuts = torch.empty(3, lines, dtype=torch.int64, device=device)
        self._states = torch.empty(lines, int(NUM_STATES.value), dtype=torch.int64, device=device)
        self._sums = torch.empty(lines, ROUNDS * NARROW_PIVOTS, dtype=torch.int64, device=device)

    def set(self, samplings: Mapping[int, Sampling], prompt_lengths: Mapping[int, int]) -> None:
        """Requests enter rows."""
        self.lists.set(samplings, prompt_lengths)

    def beyond(self, rows: IntArray) -> IntArray:
        """The places of those `rows` [n] that ask for more than fits here. They are not redrawn."""
        return self.lists.beyond[rows].nonzero()[0]

    def features(self, rows: IntArray) -> Feature:
        """What those of `rows` [n] ask for which are redrawn; none if nothing needs to be launched.

        Features that the same kernels serve come together, so that there are few cases.
        """
        features = self._table.features[rows]
        features = features[asks_for_redraw(features) & ~self.lists.beyond[rows]]
        asked = Feature(int(np.bitwise_or.reduce(features)))
        kinds = [kind for kind in _KINDS if asked & kind]
        return Feature(sum(kinds)) if kinds or not asked else Feature.ALLOWED

    def may_be_wide(self, rows: IntArray) -> bool:
        """Whether one of `rows` [n] has top-p and no top-k, so that any number of tokens may be kept."""
        return bool(self.lists.may_be_wide[rows].any())

    def redraw(
        self,
        raw: Tensor,
        rows: Tensor,
        num_tokens: Tensor,
        pairs: Tensor,
        features: Feature = ANY,
        *,
        may_be_wide: bool = True,
    ) -> None:
        """Draw anew every line whose row asks for more than a temperature.

        `raw` [n, vocab] are logits as the model gives them, `rows` [n] and `num_tokens` [n] are integers on the device,
        and `pairs` [n] int64 are those of plain rows, which say already if a line is not finite, or lower. They are
        overwritten, and so is the token of each such row at position `num_tokens` of its tokens. Only kernels that
        somebody with one of `features` needs, or where a nucleus `may_be_wide`, are launched. Nothing is asked of the
        host, so graphs may capture it.
        """
        for begin in range(0, len(rows), len(self._work)):
            slab = slice(begin, begin + len(self._work))
            self._edit(raw[slab], rows[slab], num_tokens[slab], pairs[slab], features)
            self._draw(rows[slab], num_tokens[slab], pairs[slab], features, may_be_wide)

    def logprobs(
        self, raw: Tensor, rows: Tensor, pairs: Tensor, place: int = 0, *, lines: Tensor | None = None
    ) -> None:
        """Find them for the tokens of `pairs` [n], and for as many of the likeliest as each row asks for, if it does.

        They stand in `found_logprobs` from `place` on. `raw` [n, vocab] and `rows` [n] are as in `redraw`, and graphs
        may capture this, too. With `lines` [m] int64, of these alone.
        """
        assert raw.stride(1) == 1
        n, cap, at_once = len(rows if lines is None else lines), self._soft_cap, len(self._likeliest)
        for begin in range(0, n, at_once):
            part, to = slice(begin, begin + at_once), place + begin
            chosen, of = (None, part) if lines is None else (lines[part], slice(None))
            logprob_kernel[min(at_once, n - begin),](
                raw[of], raw.stride(0), rows[of], self.lists.fields, pairs[of], chosen, self._likeliest,
                self._logprob_ids[to:], self._logprobs[to:], self._ranks[to:], self._vocab_size,
                1.0 if cap is None else cap, chosen is not None, cap is not None, LANES, self._likeliest.shape[1],
                1 + MAX_LOGPROBS, OVERLAP, num_warps=8, **EXACT,
            )  # fmt: skip

    def found_logprobs(self, places: slice) -> LogprobTensors:
        """What `logprobs` has found there, which the next call overwrites; views.

        What stands in lines of rows that do not ask, and beyond what a row asks for, means nothing.
        """
        return LogprobTensors(self._logprob_ids[places], self._logprobs[places], self._ranks[places])

    def _edit(self, raw: Tensor, rows: Tensor, num_tokens: Tensor, pairs: Tensor, features: Feature) -> None:
        assert raw.stride(1) == 1
        lists, tokens, table, vocab, n = self.lists, self._tokens, self._table, self._vocab_size, len(rows)
        tiles, chunks = _cut(n, vocab)
        dense_kernel[n, chunks](
            raw, raw.stride(0), rows, lists.fields, lists.masks, lists.masks.stride(0), pairs, self._work,
            self._num_candidates, self._masses, self._best, self._states, vocab, tiles,
            1.0 if self._soft_cap is None else self._soft_cap, self._soft_cap is not None, TILE, OVERLAP,
            num_warps=4, **EXACT,
        )  # fmt: skip
        if features & _EDITED_SPARSELY:
            sparse_kernel[n,](
                rows, lists.fields, lists.lists, lists.lists.stride(0), tokens, tokens.stride(0), num_tokens,
                self._work, vocab, 128, OVERLAP, num_warps=4, **EXACT,
            )  # fmt: skip
        if features & Feature.PENALTIES:
            count_kernel[n, PARTS](
                rows, lists.fields, tokens, tokens.stride(0), num_tokens, table.repetition, self._token_counts, vocab,
                TOKENS_AT_ONCE, OVERLAP, num_warps=4, **EXACT,
            )  # fmt: skip
            penalise_kernel[n, PARTS](
                rows, lists.fields, tokens, tokens.stride(0), num_tokens, table.repetition, table.frequency,
                table.presence, self._token_counts, self._work, vocab, TOKENS_AT_ONCE, OVERLAP,
                num_warps=4, **EXACT,
            )  # fmt: skip
        if features & Feature.TOP_N_SIGMA:
            top_n_sigma_kernel[n,](
                rows, lists.fields, table.top_n_sigma, self._work, vocab, WALK_TILE, OVERLAP, num_warps=8, **EXACT
            )

    def _draw(self, rows: Tensor, num_tokens: Tensor, pairs: Tensor, features: Feature, may_be_wide: bool) -> None:
        fields, tokens, table, vocab, n = self.lists.fields, self._tokens, self._table, self._vocab_size, len(rows)
        if features & _SURVEYED:
            survey_kernel[n, LANES // SURVEY_WIDTH](
                rows, fields, table.temperatures, pairs, self._work, self._survey, vocab,
                LANES, SURVEY_WIDTH, SURVEY_DEPTH, OVERLAP, num_warps=4, **EXACT,
            )  # fmt: skip
        tiles, chunks = _cut(n, vocab)
        restrictions = (table.temperatures, table.seeds, table.log_min_p, table.top_k, table.top_p)
        collected = (self._num_candidates, self._masses, self._best, self._candidates)
        collect_kernel[n, chunks](
            rows, fields, num_tokens, *restrictions, pairs, self._work, self._survey, *collected, vocab, tiles,
            LANES, CAPACITY, vocab <= CAPACITY, TILE, OVERLAP, num_warps=4, **EXACT,
        )  # fmt: skip
        if may_be_wide and features & Feature.RESTRICTED and vocab > CAPACITY:
            self._narrow(rows, num_tokens, pairs)
        finish_kernel[n,](
            rows, fields, num_tokens, *restrictions, tokens, tokens.stride(0), pairs, self._work, self._survey,
            *collected, self._states, self._sums, self.cuts, vocab, LANES, CAPACITY, WALK_TILE, PIVOTS,
            vocab > CAPACITY, ROUNDS, ROUNDS * NARROW_PIVOTS, NARROW_PIVOTS, OVERLAP, num_warps=8, **EXACT,
        )  # fmt: skip

    def _narrow(self, rows: Tensor, num_tokens: Tensor, pairs: Tensor) -> None:
        """Find few candidates for lines of which top-p keeps many tokens."""
        table, vocab, n, num_sums = self._table, self._vocab_size, len(rows), ROUNDS * NARROW_PIVOTS
        tiles, chunks = _cut(n, vocab)
        begin_kernel[n,](
            rows, self.lists.fields, table.log_min_p, table.top_k, table.top_p, pairs, self._survey,
            self._num_candidates, self._masses, self._candidates, self._states, self._sums, vocab,
            LANES, CAPACITY, num_sums, OVERLAP, num_warps=8, **EXACT,
        )  # fmt: skip
        for turn in range(ROUNDS):
            narrow_kernel[n, chunks](
                rows, table.temperatures, self._work, self._states, self._sums, vocab, tiles,
                turn, num_sums, NARROW_PIVOTS, CAPACITY, TILE, OVERLAP, num_warps=8, **EXACT,
            )  # fmt: skip
        gather_kernel[n, chunks](
            rows, num_tokens, table.temperatures, table.seeds, self._work, self._states, self._sums,
            self._num_candidates, self._best, self._candidates, vocab, tiles,
            ROUNDS, num_sums, NARROW_PIVOTS, CAPACITY, TILE, OVERLAP, num_warps=4, **EXACT,
        )  # fmt: skip


def _cut(num_lines: int, vocab: int) -> tuple[int, int]:
    """Tiles of a chunk, and chunks of a line."""
    tiles_of_line = triton.cdiv(vocab, TILE)
    tiles = triton.cdiv(tiles_of_line, min(tiles_of_line, triton.cdiv(ENOUGH_PROGRAMS, num_lines)))
    return tiles, triton.cdiv(tiles_of_line, tiles)
