"""Kernels that draw a row's token from its edited logits, without a sort of the vocabulary.

 1. `survey_kernel`: a line's columns go to `LANES` lanes in turn; the maximum of each lane. The n-th highest of these
    maxima is reached by at least n tokens, and by few more.
 2. `collect_kernel`: rows with top-k or top-p collect the tokens from there on, a few hundred, and the mass of all.
    All other rows draw at once.
 3. Where top-p wants more than that, `narrow_kernels.py`.
 4. `finish_kernel`: the cut, and the draw, among what is collected. If that is not enough (an enormous top-k, thousands
    of ties), it walks the line instead: slower, and as exact.

Programs of one line add up integers, so their order does not matter. Whatever is not redrawn, or marked as not finite,
is left alone.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling import packed_pairs, table
from eagleray.workers.sampling.kernels import row_key
from eagleray.workers.sampling.redraw.arithmetic import (
    LOWEST,
    PAD,
    WITHOUT_MASS,
    id_of_pair,
    is_marked,
    key_of,
    key_of_pair,
    mass_limit,
    pair_of,
    token_masses,
    value_of,
)
from eagleray.workers.sampling.redraw.cut_search import (
    cut_among,
    cut_by_walking,
    keys_of_tile,
    low_rank_key,
    weight_from,
)
from eagleray.workers.sampling.redraw.draw import floor_of, noisy_pairs
from eagleray.workers.sampling.redraw.fields import is_redrawn, word_of
from eagleray.workers.sampling.redraw.narrow_kernels import bracket_of, is_wide_line, limit_of_line
from eagleray.workers.sampling.table import Feature

_RANDOM = tl.constexpr(int(Feature.RANDOM))
_RESTRICTED = tl.constexpr(int(Feature.RESTRICTED))
_SURVEYED = tl.constexpr(int(Feature.RESTRICTED | Feature.MIN_P))
_NO_TOP_K = tl.constexpr(table.NO_TOP_K)
_INFINITY = tl.constexpr(float("inf"))
_MASKED = tl.constexpr(packed_pairs.MASKED)  # the key of minus infinity
_MASKED_PAIR = tl.constexpr((packed_pairs.MASKED << 32) + 0xFFFFFFFF)  # of token 0
_NO_KEY = tl.constexpr((1 << 31) - 1)  # above that of every number
_NO_PAIR = tl.constexpr((1 << 63) - 1)
_TOP_P_RANK = tl.constexpr(3)  # of 8 lanes, how many have a maximum where collecting for top-p begins


@triton.jit
def survey_kernel(
    rows, fields, temperatures, pairs, work, maxima, vocab,
    LANES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, part): the highest keys of `WIDTH` lanes, in `maxima` [lines, LANES] int32."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    word = word_of(fields, row)
    if is_redrawn(word) & ((word & _SURVEYED) != 0):
        work += line * vocab
        temperature = tl.load(temperatures + row)
        lanes = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
        highest = tl.full([DEPTH, WIDTH], LOWEST, tl.int32)
        for start in range(0, vocab, LANES * DEPTH):
            columns = start + tl.arange(0, DEPTH)[:, None] * LANES + lanes[None, :]
            highest = tl.maximum(highest, keys_of_tile(work, columns, vocab, temperature))
        tl.store(maxima + line * LANES + lanes, tl.max(highest, 0))


@triton.jit(do_not_specialize=["tiles", "num_tokens"])
def collect_kernel(
    rows, fields, num_tokens, temperatures, seeds, log_min_ps, top_ks, top_ps, pairs, work, maxima,
    counts, totals, best, candidates, vocab, tiles,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, FITS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, chunk) goes through `tiles` tiles of the line's columns.

    For a restricted row it adds pairs to `candidates` [lines, CAPACITY] int64, their number to `counts` [lines] int32
    and, if that is what top-p is of, the mass to `totals` [lines] int64. For others it raises `best` [lines] int64.
    `FITS` says that candidates hold the whole vocabulary.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    word = word_of(fields, row)
    if is_redrawn(word) & ~is_marked(tl.load(pairs + line)):
        work += line * vocab
        is_random = (word & _RANDOM) != 0
        temperature = tl.where(is_random, tl.load(temperatures + row), 1.0)
        highest = 0.0
        floor = _MASKED
        survey = tl.full([LANES], LOWEST, tl.int32)
        if (word & _SURVEYED) != 0:
            survey = tl.load(maxima + line * LANES + tl.arange(0, LANES))
            highest = value_of(tl.max(survey, 0))
            floor = floor_of(highest, tl.load(log_min_ps + row))
        first = tl.program_id(1) * tiles * TILE
        if (word & _RESTRICTED) != 0:
            _collect(
                work, survey, highest, floor, tl.load(top_ks + row), tl.load(top_ps + row), temperature,
                counts + line, totals + line, candidates + line * CAPACITY, vocab, first, tiles,
                LANES, CAPACITY, FITS, TILE,
            )  # fmt: skip
        else:
            noise_key = row_key(tl.load(seeds + row), tl.load(num_tokens + line).to(tl.int64))
            top = tl.full([TILE], PAD, tl.int64)
            for tile in range(tiles):
                columns = first + tile * TILE + tl.arange(0, TILE)
                keys = keys_of_tile(work, columns, vocab, temperature)
                here = pair_of(keys, columns)
                if is_random:
                    here = noisy_pairs(tl.where(keys < floor, _MASKED, keys), columns, noise_key)
                top = tl.maximum(top, tl.where(columns < vocab, here, PAD))
            tl.atomic_max(best + line, tl.max(top, 0), sem="relaxed")


@triton.jit
def _collect(
    work, survey, highest, floor, top_k, top_p, temperature, count, total, candidates, vocab, first, tiles,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, FITS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """All tokens from a threshold on, of which there are at least `top_k`, if min-p leaves so many.

    Without top-k they are a guess of how many top-p keeps. A top-k of more than half the lanes collects nothing, and
    counts more than can be held.
    """
    has_top_k = top_k < _NO_TOP_K
    rank = tl.where(has_top_k, top_k, LANES * _TOP_P_RANK // 8)
    most: tl.constexpr = 0x7FFFFFFF if FITS else LANES // 2
    is_collected = rank <= most
    threshold = floor
    if not FITS:
        rank = tl.minimum(rank, most).to(tl.int32)
        threshold = tl.maximum(floor, low_rank_key(survey, rank, rank // 8))
    threshold = tl.where(is_collected, threshold, _NO_KEY)
    needs_total = ~has_top_k & (top_p < _INFINITY)
    mass = tl.zeros([TILE], tl.int64)
    for tile in range(tiles):
        columns = first + tile * TILE + tl.arange(0, TILE)
        keys = keys_of_tile(work, columns, vocab, temperature)
        is_hit = keys >= threshold
        num_hits = tl.sum(is_hit.to(tl.int32), 0)
        if num_hits > 0:
            begin = tl.atomic_add(count, num_hits, sem="relaxed")
            places = begin + tl.cumsum(is_hit.to(tl.int32), 0) - 1
            tl.store(candidates + places, pair_of(keys, columns), mask=is_hit & (places < CAPACITY))
        if needs_total:
            mass += tl.where(keys >= floor, token_masses(value_of(keys), highest), 0)
    if needs_total:
        tl.atomic_add(total, tl.sum(mass, 0), sem="relaxed")
    if ~is_collected:
        tl.atomic_add(count, CAPACITY + 1, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def finish_kernel(
    rows, fields, num_tokens, temperatures, seeds, log_min_ps, top_ks, top_ps, tokens, token_stride, pairs, work,
    maxima, counts, totals, best, candidates, states, sums, cuts, vocab,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr, NARROWS: tl.constexpr,
    ROUNDS: tl.constexpr, NUM_SUMS: tl.constexpr, NARROW_PIVOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a line: its pair, and its token behind those of its row in `tokens` [rows, length] int32.

    `NARROWS` says that there may be wide lines. `cuts` [lines] int64 has the lowest pair that could be drawn, if the
    row is restricted; only tests look at it.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    word = word_of(fields, row)
    if is_redrawn(word):
        position = tl.load(num_tokens + line).to(tl.int64)
        pair = tl.load(pairs + line)
        if ~is_marked(pair):
            pair = tl.load(best + line)
            is_wide = line < 0
            if NARROWS:
                is_wide = is_wide_line(states, line)
            if is_wide:
                low, last, above, _ = bracket_of(states, sums, line, ROUNDS, NUM_SUMS, NARROW_PIVOTS, CAPACITY)
                noise_key = row_key(tl.load(seeds + row), position)
                wide = _draw_wide(
                    work + line * vocab, vocab, maxima + line * LANES, candidates + line * CAPACITY, cuts + line,
                    tl.load(counts + line), tl.load(temperatures + row), low, last, above, limit_of_line(states, line),
                    noise_key, LANES, CAPACITY, TILE, PIVOTS,
                )  # fmt: skip
                pair = tl.maximum(pair, wide)
            elif (word & _RESTRICTED) != 0:
                pair = _draw_restricted(
                    work + line * vocab, vocab, maxima + line * LANES, candidates + line * CAPACITY, cuts + line,
                    tl.load(counts + line), tl.load(totals + line), tl.load(temperatures + row),
                    tl.load(log_min_ps + row), tl.load(top_ks + row), tl.load(top_ps + row),
                    row_key(tl.load(seeds + row), position), LANES, CAPACITY, TILE, PIVOTS,
                )  # fmt: skip
            tl.store(pairs + line, pair)
        tl.store(tokens + row * token_stride + position, id_of_pair(pair))


@triton.jit
def _draw_wide(
    work, vocab, maxima, candidates, cuts, count, temperature, low, last, above, limit, noise_key,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The best noisy pair of those between the cut and the end of a bracket, whose tokens are the candidates."""
    highest = value_of(tl.max(tl.load(maxima + tl.arange(0, LANES)), 0))
    if count <= CAPACITY:
        lanes = tl.arange(0, CAPACITY)
        here = tl.load(candidates + lanes, mask=lanes < count, other=PAD)
        keys, token_ids = key_of_pair(here), id_of_pair(here)
        masses = tl.where(lanes < count, token_masses(value_of(keys), highest), 0)
        cut = cut_among(keys, token_ids, masses, limit - above)
        is_drawn = (here >= cut) & (lanes < count)
        top = tl.max(tl.where(is_drawn, noisy_pairs(keys, token_ids, noise_key), PAD), 0)
    else:
        cut = cut_by_walking(work, vocab, temperature, highest, low, last, above, limit, True, PIVOTS, TILE)
        top = _best_from(work, vocab, temperature, cut, noise_key, TILE)
    tl.store(cuts, cut)
    return top


@triton.jit
def _best_from(work, vocab, temperature, cut, noise_key, TILE: tl.constexpr):
    """The best noisy pair of all at or above `cut`, by walking."""
    best = tl.full([TILE], PAD, tl.int64)
    for start in range(0, vocab, TILE):
        columns = start + tl.arange(0, TILE)
        keys = keys_of_tile(work, columns, vocab, temperature)
        best = tl.maximum(best, tl.where(pair_of(keys, columns) >= cut, noisy_pairs(keys, columns, noise_key), PAD))
    return tl.max(best, 0)


@triton.jit
def _draw_restricted(
    work, vocab, maxima, candidates, cuts, count, total, temperature, log_min_p, top_k, top_p, noise_key,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr, PIVOTS: tl.constexpr,
):  # fmt: skip
    """The best noisy pair of those at or above the cut. Where all is masked: that of a masked token."""
    highest_key = tl.max(tl.load(maxima + tl.arange(0, LANES)), 0)
    highest = value_of(highest_key)
    top = tl.full([], _MASKED_PAIR, tl.int64)
    cut = tl.full([], PAD, tl.int64)
    is_done = highest_key == _MASKED
    if ~is_done & (count <= CAPACITY):
        lanes = tl.arange(0, CAPACITY)
        here = tl.load(candidates + lanes, mask=lanes < count, other=PAD)
        keys, token_ids = key_of_pair(here), id_of_pair(here)
        is_done = True
        cut = tl.min(tl.where(lanes < count, here, _NO_PAIR), 0)
        if top_k < count:
            cut = cut_among(keys, token_ids, (lanes < count).to(tl.int64), top_k)
        if top_p < _INFINITY:
            masses = tl.where((here >= cut) & (lanes < count), token_masses(value_of(keys), highest), 0)
            mass = tl.sum(masses, 0)
            limit = mass_limit(top_p, tl.where(top_k < _NO_TOP_K, mass, total))
            is_done = mass >= limit
            if is_done:
                cut = tl.maximum(cut, cut_among(keys, token_ids, masses, limit))
        noisy = noisy_pairs(keys, token_ids, noise_key)
        top = tl.maximum(top, tl.max(tl.where((here >= cut) & (lanes < count), noisy, PAD), 0))
    if ~is_done:
        floor = floor_of(highest, log_min_p)
        cut = _cut_of_line(work, vocab, temperature, highest, floor, top_k, top_p, PIVOTS, TILE)
        top = tl.maximum(_best_from(work, vocab, temperature, cut, noise_key, TILE), _MASKED_PAIR)
    tl.store(cuts, cut)
    return top


@triton.jit
def _nothing():
    """No weight, int64."""
    return tl.full([], 0, tl.int64)


@triton.jit
def _cut_of_line(
    work, vocab, temperature, highest, floor, top_k, top_p, PIVOTS: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """The cut of all restrictions, by walking."""
    cut = floor.to(tl.int64) << 32  # below the pair of any token with that key
    if top_k < _NO_TOP_K:  # noqa: SIM102  `and` would compute both
        if weight_from(work, vocab, temperature, highest, cut, False, TILE) > top_k:
            cut = cut_by_walking(
                work, vocab, temperature, highest, floor, key_of(highest), _nothing(), top_k, False, PIVOTS, TILE
            )
    if top_p < _INFINITY:
        limit = mass_limit(top_p, weight_from(work, vocab, temperature, highest, cut, True, TILE))
        low = tl.maximum(key_of_pair(cut), key_of(highest - WITHOUT_MASS))
        of_mass = cut_by_walking(
            work, vocab, temperature, highest, low, key_of(highest), _nothing(), limit, True, PIVOTS, TILE
        )
        cut = tl.maximum(cut, of_mass)
    return cut
