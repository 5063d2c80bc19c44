"""Kernel of log-probabilities under raw logits: `logprobs.py`, for the tokens that were drawn."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling.redraw.arithmetic import (
    LOWEST,
    PAD,
    id_of_pair,
    is_marked,
    key_of,
    key_of_pair,
    logits_of,
    pair_of,
    value_of,
)
from eagleray.workers.sampling.redraw.cut_search import low_rank_key
from eagleray.workers.sampling.redraw.fields import NUM_LOGPROBS, field, word_of
from eagleray.workers.sampling.table import Feature

_LOGPROBS = tl.constexpr(int(Feature.LOGPROBS))
_NO_PAIR = tl.constexpr((1 << 63) - 1)  # above that of every token


@triton.jit
def _raw_keys(raw, columns, vocab, cap, HAS_CAP: tl.constexpr):
    """Keys int32 of raw logits, `LOWEST` beyond the vocabulary."""
    values = logits_of(tl.load(raw + columns, mask=columns < vocab, other=0.0), cap, HAS_CAP)
    return tl.where(columns < vocab, key_of(values), LOWEST)


@triton.jit
def logprob_kernel(
    raw, stride, rows, fields, pairs, lines, candidates, token_ids, logprobs, ranks, vocab, cap,
    HAS_LINES: tl.constexpr, HAS_CAP: tl.constexpr, LANES: tl.constexpr, FEW: tl.constexpr, WIDTH: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program a line whose row asks: the token of its pair first, then the likeliest in order.

    `token_ids` int64 and `logprobs` float32 have `WIDTH` columns, of which one more is written than the row asks for;
    `ranks` [lines] int64 are those of the first. `candidates` [lines, FEW] int64 is memory. With `lines` int64, those
    are looked at in place of the first ones.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    source = line
    if HAS_LINES:
        source = tl.load(lines + line)
    row = tl.load(rows + source).to(tl.int64)
    if (word_of(fields, row) & _LOGPROBS) != 0:
        token_ids += line * WIDTH
        logprobs += line * WIDTH
        pair = tl.load(pairs + source)
        if is_marked(pair):  # nothing can be said, and nobody will look
            places = tl.arange(0, LANES)
            tl.store(token_ids + places, 0, mask=places < WIDTH)
            tl.store(logprobs + places, float("nan"), mask=places < WIDTH)
            tl.store(ranks + line, tl.full([], 1, tl.int64))
        else:
            rank = _describe(
                raw + source * stride, id_of_pair(pair), candidates + line * FEW, token_ids, logprobs,
                tl.minimum(field(fields, row, NUM_LOGPROBS), vocab), vocab, cap, HAS_CAP, LANES, FEW,
            )  # fmt: skip
            tl.store(ranks + line, rank)


@triton.jit
def _describe(
    raw, token_id, candidates, token_ids, logprobs, num_top, vocab, cap,
    HAS_CAP: tl.constexpr, LANES: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Fills the line's token ids and log-probabilities; the rank int64 of the first."""
    lanes = tl.arange(0, LANES)
    survey = tl.full([LANES], LOWEST, tl.int32)
    for start in range(0, vocab, LANES):
        survey = tl.maximum(survey, _raw_keys(raw, start + lanes, vocab, cap, HAS_CAP))
    highest = value_of(tl.max(survey, 0))
    threshold = low_rank_key(survey, tl.minimum(tl.maximum(num_top, 1), LANES), 0)
    own = logits_of(tl.load(raw + token_id), cap, HAS_CAP)
    own_key = key_of(own)
    weights = tl.zeros([LANES], tl.float32)
    above = tl.zeros([LANES], tl.int32)
    seen = 0
    for start in range(0, vocab, LANES):
        keys = _raw_keys(raw, start + lanes, vocab, cap, HAS_CAP)
        weights += tl.where(start + lanes < vocab, tl.exp(value_of(keys) - highest), 0.0)
        above += (keys > own_key).to(tl.int32)
        is_hit = (keys >= threshold).to(tl.int32)
        num_hits = tl.sum(is_hit, 0)
        if (num_hits > 0) & (num_top > 0):
            places = seen + tl.cumsum(is_hit, 0) - 1
            tl.store(candidates + places, pair_of(keys, start + lanes), mask=(is_hit != 0) & (places < FEW))
        seen += num_hits
    tl.debug_barrier()
    log_total = tl.log(tl.sum(weights, 0))
    tl.store(token_ids, token_id.to(tl.int64))
    tl.store(logprobs, own - highest - log_total)
    few = tl.arange(0, FEW)
    seen = tl.where(num_top > 0, seen, 0)
    here = tl.load(candidates + few, mask=few < seen, other=PAD)
    previous = tl.full([], _NO_PAIR, tl.int64)
    for place in range(1, num_top + 1):
        best = tl.max(tl.where(here < previous, here, PAD), 0)
        if seen > FEW:  # hundreds of ties: some are not here
            best = _best_below(raw, previous, vocab, cap, HAS_CAP, LANES)
        tl.store(token_ids + place, id_of_pair(best).to(tl.int64))
        tl.store(logprobs + place, value_of(key_of_pair(best)) - highest - log_total)
        previous = best
    return tl.sum(above, 0).to(tl.int64) + 1


@triton.jit
def _best_below(raw, pair, vocab, cap, HAS_CAP: tl.constexpr, LANES: tl.constexpr):
    """The highest pair below `pair`, by walking the line."""
    best = tl.full([LANES], PAD, tl.int64)
    for start in range(0, vocab, LANES):
        columns = start + tl.arange(0, LANES)
        here = pair_of(_raw_keys(raw, columns, vocab, cap, HAS_CAP), columns)
        best = tl.maximum(best, tl.where((here < pair) & (columns < vocab), here, PAD))
    return tl.max(best, 0)
