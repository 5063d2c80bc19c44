"""Finds the cut of top-k or top-p: the lowest (value, id) pair that may be drawn.

Every token has a weight, 1 for top-k and its mass for top-p, and a token stays if the weight before it is below the
limit. So the cut's value is the highest one at or above which there is weight enough. All tokens with that value weigh
the same, so how many of them stay is a division; those with the lower ids do.

Values are looked for as keys, int32 numbers that compare like them. The bracket `[low, last]` always holds the cut's.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from eagleray.workers.sampling.redraw.arithmetic import LOWEST, key_of, pair_of, token_masses, value_of

_HIGHEST = tl.constexpr((1 << 31) - 1)


@triton.jit
def _upper_middle(low, last):
    """Of int32 bounds, at least `low` + 1."""
    return (low + ((last.to(tl.int64) - low + 1) >> 1)).to(tl.int32)


@triton.jit
def low_rank_key(keys, rank, slack):
    """A key int32 that at least `rank` of `keys` [n] int32 reach, and at most `slack` more where ties permit."""
    low = tl.min(keys, 0)
    last = tl.max(keys, 0)
    reached = tl.sum((keys >= low).to(tl.int32), 0)
    while (low < last) & (reached > rank + slack):
        middle = _upper_middle(low, last)
        num = tl.sum((keys >= middle).to(tl.int32), 0)
        is_enough = num >= rank
        low, last = tl.where(is_enough, middle, low), tl.where(is_enough, last, middle - 1)
        reached = tl.where(is_enough, num, reached)
    return low


@triton.jit
def _num_staying(limit, above, each):
    """How many tokens with the cut's value stay, if those above it weigh `above` and every one of them `each`."""
    return (limit - above + tl.maximum(each, 1) - 1) // tl.maximum(each, 1)


@triton.jit
def cut_among(keys, token_ids, weights, limit):
    """The cut, a pair int64, among tokens with `keys`, `token_ids` (both [n] int32) and `weights` [n] int64.

    The sum of weights must reach `limit` int64. What has no weight is not looked at.
    """
    low = tl.min(tl.where(weights > 0, keys, _HIGHEST), 0)
    last = tl.max(tl.where(weights > 0, keys, LOWEST), 0)
    while low < last:
        middle = _upper_middle(low, last)
        is_enough = tl.sum(tl.where(keys >= middle, weights, 0), 0) >= limit
        low, last = tl.where(is_enough, middle, low), tl.where(is_enough, last, middle - 1)
    is_tie = (keys == low) & (weights > 0)
    above = tl.sum(tl.where(keys > low, weights, 0), 0)
    staying = _num_staying(limit, above, tl.max(tl.where(is_tie, weights, 0), 0))
    first = tl.min(tl.where(is_tie, token_ids, _HIGHEST), 0)
    bound = tl.max(tl.where(is_tie, token_ids, 0), 0)
    first = tl.where(staying >= tl.sum(is_tie.to(tl.int32), 0), bound, first)
    while first < bound:  # the lowest id up to which so many stay
        middle = (first + bound) >> 1
        is_enough = tl.sum((is_tie & (token_ids <= middle)).to(tl.int32), 0) >= staying
        first, bound = tl.where(is_enough, first, middle + 1), tl.where(is_enough, middle, bound)
    return pair_of(low, bound)


# ---- the same by walking a line of the vocabulary several times


@triton.jit
def keys_of_tile(work, columns, vocab, temperature):
    """Keys int32 of a line's logits over `temperature`, `LOWEST` beyond the vocabulary."""
    logits = tl.load(work + columns, mask=columns < vocab, other=0.0)
    return tl.where(columns < vocab, key_of(tl.div_rn(logits, temperature)), LOWEST)


@triton.jit
def _weights_of(keys, highest, BY_MASS: tl.constexpr):
    """[n] int64."""
    if BY_MASS:
        return token_masses(value_of(keys), highest)
    else:
        return tl.full(keys.shape, 1, tl.int64)


@triton.jit
def weight_from(work, vocab, temperature, highest, lowest_pair, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The weight int64 of all tokens at or above `lowest_pair`."""
    total = tl.zeros([TILE], tl.int64)
    for start in range(0, vocab, TILE):
        columns = start + tl.arange(0, TILE)
        keys = keys_of_tile(work, columns, vocab, temperature)
        total += tl.where(pair_of(keys, columns) >= lowest_pair, _weights_of(keys, highest, BY_MASS), 0)
    return tl.sum(total, 0)


@triton.jit
def pivots_between(low, last, by_value, PIVOTS: tl.constexpr):
    """Keys [PIVOTS] int32 in `(low, last]`, that cut the bracket evenly: between the values, or between the keys.

    Values are the better guess. Keys make sure that the bracket shrinks, whatever the values are.
    """
    turns = tl.arange(0, PIVOTS) + 1
    fraction = turns.to(tl.float32) * (1.0 / (PIVOTS + 1))
    between_values = key_of(value_of(low) + (value_of(last) - value_of(low)) * fraction)
    between_keys = (low + (last.to(tl.int64) - low + 1) * turns // (PIVOTS + 1)).to(tl.int32)
    return tl.minimum(tl.maximum(tl.where(by_value, between_values, between_keys), low + 1), last)


@triton.jit
def cut_by_walking(
    work, vocab, temperature, highest, low, last, above, limit,
    BY_MASS: tl.constexpr, PIVOTS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The cut, a pair int64, among the logits of `work` [vocab] over `temperature`, of which `highest` is the highest.

    Its key is from `low` to `last`, both int32: the tokens with keys from `low` on weigh `limit` or more, and those
    beyond `last` weigh `above`, which is less. Each pass looks at several pivots, and also
    finds the ends of what the bracket holds; so it ends when there is one value left, however many tokens have it.
    """
    turn = 0
    while low < last:
        pivots = pivots_between(low, last, turn % 2 == 0, PIVOTS)
        sums = tl.zeros([PIVOTS, TILE], tl.int64)
        least = tl.full([TILE], _HIGHEST, tl.int32)
        most = tl.full([TILE], LOWEST, tl.int32)
        for start in range(0, vocab, TILE):
            keys = keys_of_tile(work, start + tl.arange(0, TILE), vocab, temperature)
            weights = tl.where((keys >= low) & (keys <= last), _weights_of(keys, highest, BY_MASS), 0)
            least = tl.minimum(least, tl.where(weights > 0, keys, _HIGHEST))
            most = tl.maximum(most, tl.where(weights > 0, keys, LOWEST))
            sums += tl.where(keys[None, :] >= pivots[:, None], weights[None, :], 0)
        reached = above + tl.sum(sums, 1)
        is_enough = reached >= limit
        low = tl.maximum(tl.max(tl.where(is_enough, pivots, low), 0), tl.min(least, 0))
        last = tl.minimum(tl.min(tl.where(is_enough, last, pivots - 1), 0), tl.max(most, 0))
        above = tl.max(tl.where(is_enough, above, reached), 0)
        turn += 1
    each = tl.max(_weights_of(tl.full([1], 0, tl.int32) + low, highest, BY_MASS), 0)
    staying = tl.minimum(_num_staying(limit, above, each), vocab).to(tl.int32)
    return pair_of(low, _place_of_tie(work, vocab, temperature, low, staying, TILE))


@triton.jit
def _place_of_tie(work, vocab, temperature, key, rank, TILE: tl.constexpr):
    """The id int32 of the `rank`-th token that has this key."""
    place = vocab
    seen = 0
    start = 0
    while (seen < rank) & (start < vocab):
        columns = start + tl.arange(0, TILE)
        is_tie = (keys_of_tile(work, columns, vocab, temperature) == key).to(tl.int32)
        is_place = (is_tie != 0) & (seen + tl.cumsum(is_tie, 0) == rank)
        place = tl.min(tl.where(is_place, columns, place), 0)
        seen += tl.sum(is_tie, 0)
        start += TILE
    return place
