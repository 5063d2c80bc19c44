"""Kernels that find the cut of a wide nucleus: many programs narrow each line's bracket down to a few candidates.

Where top-p keeps more tokens than were collected (`draw_kernels.py`), a line's programs look at all of it again:

 1. `begin_kernel` decides which lines need this, and between which keys their cut lies;
 2. `narrow_kernel`, several times: the mass from each of some pivots on. The next launch narrows the bracket by it, or
    does nothing once what lies in the bracket cannot be more than the candidates that there is room for;
 3. `gather_kernel`: what lies above the bracket may be drawn for sure, so its best noisy pair is known; what lies in
    it becomes the line's candidates.

`finish_kernel` does the rest. Sums are of integers, so it does not matter which program comes first.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling import packed_pairs, table
from eagleray.workers.sampling.kernels import row_key
from eagleray.workers.sampling.redraw.arithmetic import (
    LOG2_E,
    PAD,
    WITHOUT_MASS,
    is_marked,
    key_of,
    key_of_pair,
    mass_limit,
    pair_of,
    token_masses,
    value_of,
)
from eagleray.workers.sampling.redraw.cut_search import keys_of_tile, pivots_between
from eagleray.workers.sampling.redraw.draw import floor_of, noisy_pairs
from eagleray.workers.sampling.redraw.fields import (
    ABOVE,
    HIGHEST,
    IS_WIDE,
    LAST,
    LIMIT,
    LOW,
    NUM_STATES,
    TOTAL,
    is_redrawn,
    word_of,
)
from eagleray.workers.sampling.table import Feature

_RESTRICTED = tl.constexpr(int(Feature.RESTRICTED))
_NO_TOP_K = tl.constexpr(table.NO_TOP_K)
_MASKED = tl.constexpr(packed_pairs.MASKED)
_INFINITY = tl.constexpr(float("inf"))
_NO_KEY = tl.constexpr((1 << 31) - 1)
OCTAVES_OF_ONE = tl.constexpr(44.0)  # from the likeliest token's mass down to 1


@triton.jit
def begin_kernel(
    rows, fields, log_min_ps, top_ks, top_ps, pairs, maxima, counts, totals, candidates, states, sums, vocab,
    LANES: tl.constexpr, CAPACITY: tl.constexpr, NUM_SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a line: its state in `states` [lines, NUM_STATES] int64, and its `sums` [lines, NUM_SUMS] are zero.

    A line is wide if it has top-p and no top-k, and its candidates do not hold enough mass. It has none from now on.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    word = word_of(fields, row)
    states += line * NUM_STATES
    is_wide = line < 0
    if is_redrawn(word) & ((word & _RESTRICTED) != 0) & ~is_marked(tl.load(pairs + line)):
        top_p = tl.load(top_ps + row)
        highest_key = tl.max(tl.load(maxima + line * LANES + tl.arange(0, LANES)), 0)
        if (tl.load(top_ks + row) == _NO_TOP_K) & (top_p < _INFINITY) & (highest_key != _MASKED):
            highest = value_of(highest_key)
            total = tl.load(totals + line)
            limit = mass_limit(top_p, total)
            count = tl.load(counts + line)
            lanes = tl.arange(0, CAPACITY)
            is_here = lanes < tl.where(count <= CAPACITY, count, 0)
            keys = key_of_pair(tl.load(candidates + line * CAPACITY + lanes, mask=is_here, other=PAD))
            above = tl.sum(tl.where(is_here, token_masses(value_of(keys), highest), 0), 0)
            last = tl.min(tl.where(is_here, keys, _NO_KEY), 0)  # all tokens from here on are candidates
            last = tl.where(last == _NO_KEY, highest_key, last - 1)
            is_wide = above < limit
            if is_wide:
                low = tl.maximum(
                    floor_of(highest, tl.load(log_min_ps + row)), _key_without(total - limit, highest, vocab)
                )
                tl.store(states + LOW, low.to(tl.int64))
                tl.store(states + LAST, last.to(tl.int64))
                tl.store(states + ABOVE, above)
                tl.store(states + LIMIT, limit)
                tl.store(states + TOTAL, total)
                tl.store(states + HIGHEST, highest_key.to(tl.int64))
                tl.store(sums + line * NUM_SUMS + tl.arange(0, NUM_SUMS), tl.zeros([NUM_SUMS], tl.int64))
                tl.store(counts + line, 0)
    tl.store(states + IS_WIDE, is_wide.to(tl.int64))


@triton.jit
def _key_without(spare, highest, vocab):
    """A key int32 below which all `vocab` tokens together could not weigh more than `spare` int64.

    A hundredth of an octave lower than that, which is more than rounding takes.
    """
    octaves = OCTAVES_OF_ONE - tl.log2(tl.maximum(spare, 1).to(tl.float32) / vocab) + 0.01
    distance = tl.where(spare > 0, octaves * (1 / LOG2_E), WITHOUT_MASS)
    return key_of(highest - tl.minimum(distance, WITHOUT_MASS))


@triton.jit
def is_wide_line(states, line):
    """Whether `line` int64 has a bracket."""
    return tl.load(states + line * NUM_STATES + IS_WIDE) != 0


@triton.jit
def limit_of_line(states, line):
    """The mass int64 that top-p wants of a wide line."""
    return tl.load(states + line * NUM_STATES + LIMIT)


@triton.jit
def bracket_of(
    states, sums, line, ROUNDS: tl.constexpr, NUM_SUMS: tl.constexpr, PIVOTS: tl.constexpr, CAPACITY: tl.constexpr
):
    """The bracket of a wide line after so many rounds: keys `low` and `last` int32 with the cut's between them, the
    mass int64 of all keys beyond `last`, and whether no more than `CAPACITY` tokens can have keys of the bracket.

    A round after that has changed nothing.
    """
    states += line * NUM_STATES
    low, last = tl.load(states + LOW).to(tl.int32), tl.load(states + LAST).to(tl.int32)
    above, limit, from_low = tl.load(states + ABOVE), tl.load(states + LIMIT), tl.load(states + TOTAL)
    highest = value_of(tl.load(states + HIGHEST).to(tl.int32))
    is_narrow = _are_few(low, above, from_low, highest, CAPACITY)
    for turn in tl.static_range(ROUNDS):
        reached = above + tl.load(sums + line * NUM_SUMS + turn * PIVOTS + tl.arange(0, PIVOTS))
        pivots = pivots_between(low, last, True, PIVOTS)
        is_enough = reached >= limit
        new_low = tl.max(tl.where(is_enough, pivots, low), 0)
        new_last = tl.min(tl.where(is_enough, last, pivots - 1), 0)
        new_above = tl.max(tl.where(is_enough, above, reached), 0)
        new_from_low = tl.min(tl.where(is_enough, reached, from_low), 0)
        low, last = tl.where(is_narrow, low, new_low), tl.where(is_narrow, last, new_last)
        above, from_low = tl.where(is_narrow, above, new_above), tl.where(is_narrow, from_low, new_from_low)
        is_narrow = _are_few(low, above, from_low, highest, CAPACITY)
    return low, last, above, is_narrow


@triton.jit
def _are_few(low, above, from_low, highest, CAPACITY: tl.constexpr):
    """Whether the mass from key `low` on, less that `above` a bracket, is that of `CAPACITY` tokens at most."""
    least = tl.max(token_masses(value_of(tl.full([1], 0, tl.int32) + low), highest), 0)
    return (from_low - above) // CAPACITY < least


@triton.jit(do_not_specialize=["tiles"])
def narrow_kernel(
    rows, temperatures, work, states, sums, vocab, tiles,
    ROUND: tl.constexpr, NUM_SUMS: tl.constexpr, PIVOTS: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, chunk) adds to `sums` the masses from each pivot on, of `tiles` tiles of a wide line's columns."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    if is_wide_line(states, line):
        low, last, _, is_narrow = bracket_of(states, sums, line, ROUND, NUM_SUMS, PIVOTS, CAPACITY)
        if not is_narrow:
            temperature = tl.load(temperatures + tl.load(rows + line))
            highest = value_of(tl.load(states + line * NUM_STATES + HIGHEST).to(tl.int32))
            pivots = pivots_between(low, last, True, PIVOTS)
            first = tl.program_id(1) * tiles * TILE
            found = tl.zeros([PIVOTS, TILE], tl.int64)
            for tile in range(tiles):
                keys = keys_of_tile(work + line * vocab, first + tile * TILE + tl.arange(0, TILE), vocab, temperature)
                masses = tl.where((keys >= low) & (keys <= last), token_masses(value_of(keys), highest), 0)
                found += tl.where(keys[None, :] >= pivots[:, None], masses[None, :], 0)
            places = sums + line * NUM_SUMS + ROUND * PIVOTS + tl.arange(0, PIVOTS)
            tl.atomic_add(places, tl.sum(found, 1), sem="relaxed")


@triton.jit(do_not_specialize=["tiles", "num_tokens"])
def gather_kernel(
    rows, num_tokens, temperatures, seeds, work, states, sums, counts, best, candidates, vocab, tiles,
    ROUNDS: tl.constexpr, NUM_SUMS: tl.constexpr, PIVOTS: tl.constexpr, CAPACITY: tl.constexpr, TILE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, chunk), of a wide line: raises `best` [lines] int64 by what is above the bracket, and adds what is
    in it to `candidates` [lines, CAPACITY] int64 and `counts` [lines] int32.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    if is_wide_line(states, line):
        row = tl.load(rows + line).to(tl.int64)
        temperature = tl.load(temperatures + row)
        noise_key = row_key(tl.load(seeds + row), tl.load(num_tokens + line).to(tl.int64))
        low, last, _, _ = bracket_of(states, sums, line, ROUNDS, NUM_SUMS, PIVOTS, CAPACITY)
        first = tl.program_id(1) * tiles * TILE
        top = tl.full([TILE], PAD, tl.int64)
        for tile in range(tiles):
            columns = first + tile * TILE + tl.arange(0, TILE)
            keys = keys_of_tile(work + line * vocab, columns, vocab, temperature)
            top = tl.maximum(top, tl.where(keys > last, noisy_pairs(keys, columns, noise_key), PAD))
            is_hit = (keys >= low) & (keys <= last)
            num_hits = tl.sum(is_hit.to(tl.int32), 0)
            if num_hits > 0:
                begin = tl.atomic_add(counts + line, num_hits, sem="relaxed")
                places = begin + tl.cumsum(is_hit.to(tl.int32), 0) - 1
                there = candidates + line * CAPACITY + places
                tl.store(there, pair_of(keys, columns), mask=is_hit & (places < CAPACITY))
        tl.atomic_max(best + line, tl.max(top, 0), sem="relaxed")
