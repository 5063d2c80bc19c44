"""Kernels that make of raw logits those that a row draws from, but for penalties: soft cap, masks, bias."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling.redraw.arithmetic import LOW, NOT_FINITE, PAD, logits_of
from eagleray.workers.sampling.redraw.fields import (
    IS_WIDE,
    LONGEST_BEGINNING,
    MIN_TOKENS,
    NUM_BAD_WORDS,
    NUM_BIAS,
    NUM_STATES,
    NUM_STOP,
    PROMPT_LENGTH,
    field,
    is_redrawn,
    word_of,
)
from eagleray.workers.sampling.table import Feature

_ALLOWED = tl.constexpr(int(Feature.ALLOWED))
_SPARSE = tl.constexpr(int(Feature.MIN_TOKENS | Feature.BIAS | Feature.BAD_WORDS))


@triton.jit(do_not_specialize=["tiles"])
def dense_kernel(
    raw, stride, rows, fields, masks, mask_stride, pairs, work, counts, totals, best, states, vocab, tiles, cap,
    HAS_CAP: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, chunk) copies `tiles` tiles of the line's logits to `work` in float32, capped, and masked where
    the row allows only some tokens. A line with a logit that is not finite has its pair marked.

    The first program of a line empties what `draw_kernels.py` collects of it, and says that it is not wide.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    word = word_of(fields, row)
    if is_redrawn(word):
        if tl.program_id(1) == 0:
            tl.store(counts + line, 0)
            tl.store(totals + line, tl.full([], 0, tl.int64))
            tl.store(best + line, tl.full([], PAD, tl.int64))
            tl.store(states + line * NUM_STATES + IS_WIDE, tl.full([], 0, tl.int64))
        raw += line * stride
        work += line * vocab
        masks += row * mask_stride
        first = tl.program_id(1) * tiles * TILE
        is_broken = tl.zeros([TILE], tl.int32)
        for tile in range(tiles):
            columns = first + tile * TILE + tl.arange(0, TILE)
            inside = columns < vocab
            loaded = tl.load(raw + columns, mask=inside, other=0.0)
            is_broken |= (~(tl.abs(loaded.to(tl.float32)) < float("inf"))).to(tl.int32)
            values = logits_of(loaded, cap, HAS_CAP)
            if (word & _ALLOWED) != 0:
                bits = tl.load(masks + (columns >> 5), mask=inside, other=0)
                values = tl.where(((bits >> (columns & 31)) & 1) != 0, values, float("-inf"))
            tl.store(work + columns, values, mask=inside)
        if tl.max(is_broken, 0) != 0:
            tl.atomic_max(pairs + line, (tl.full([], NOT_FINITE, tl.int64) << 32) + LOW)  # beside token 0


@triton.jit(do_not_specialize=["num_tokens"])
def sparse_kernel(
    rows, fields, lists, list_stride, tokens, token_stride, num_tokens, work, vocab,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a line: adds bias; then masks stop tokens until there are `min_tokens`, and what would complete a
    bad word. The order does not matter, but for two threads that write the same logit: a masked one stays masked.

    `row_lists.py` says how the row's numbers stand in `lists`.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if (word_of(fields, row) & _SPARSE) != 0:
        work += line * vocab
        tokens += row * token_stride
        lists += row * list_stride
        num_bias = field(fields, row, NUM_BIAS)
        num_stop = field(fields, row, NUM_STOP)
        num_words = field(fields, row, NUM_BAD_WORDS)
        length = tl.load(num_tokens + line).to(tl.int32)
        prompt_length = field(fields, row, PROMPT_LENGTH)
        lanes = tl.arange(0, BLOCK)
        for start in range(0, num_bias, BLOCK):
            inside = start + lanes < num_bias
            columns = tl.load(lists + start + lanes, mask=inside, other=0)
            bias = tl.load(lists + num_bias + start + lanes, mask=inside, other=0).to(tl.float32, bitcast=True)
            values = tl.load(work + columns, mask=inside, other=0.0)
            tl.store(work + columns, values + bias, mask=inside)
        tl.debug_barrier()
        lists += 2 * num_bias
        if length - prompt_length < field(fields, row, MIN_TOKENS):
            for start in range(0, num_stop, BLOCK):
                inside = start + lanes < num_stop
                columns = tl.load(lists + start + lanes, mask=inside, other=0)
                tl.store(work + columns, float("-inf"), mask=inside)
        ends = lists + num_stop
        word_tokens = ends + num_words
        longest = field(fields, row, LONGEST_BEGINNING)
        for start in range(0, num_words, BLOCK):
            inside = start + lanes < num_words
            end = tl.load(ends + start + lanes, mask=inside, other=1)
            begin = tl.load(ends + start + lanes - 1, mask=inside & (start + lanes > 0), other=0)
            completes = inside
            for back in range(1, longest + 1):  # the token so far behind, which the word begins with or not
                has_one = end - 1 - back >= begin
                wanted = tl.load(word_tokens + end - 1 - back, mask=inside & has_one, other=0)
                drawn = tl.load(tokens + tl.maximum(length - back, 0))
                drawn = tl.where(length - back >= prompt_length, drawn, -1)  # a word begins behind the prompt
                completes &= ~has_one | (wanted == drawn)
            columns = tl.load(word_tokens + end - 1, mask=inside, other=0)
            tl.store(work + columns, float("-inf"), mask=completes)
