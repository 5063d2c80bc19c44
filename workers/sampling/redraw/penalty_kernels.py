"""Kernels that penalise the tokens of a row, as `penalties.py` does: the work grows with them, not with the vocabulary.

One kernel counts them, the next walks the same tokens. Of all places where a token stands the first to take its count
penalises it, and leaves zero behind. So the counts are empty again after each step, without a pass over them.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling.redraw.fields import PROMPT_LENGTH, field, word_of
from eagleray.workers.sampling.table import Feature

_PENALTIES = tl.constexpr(int(Feature.PENALTIES))
_SEEN = tl.constexpr(1 << 30)  # beside the count of a token in the output: it is in the prompt


@triton.jit
def _first_position(repetition, prompt_length):
    """Only a repetition penalty asks for the prompt."""
    return tl.where(repetition == 1.0, prompt_length, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def count_kernel(
    rows, fields, tokens, token_stride, num_tokens, repetitions, counts, vocab,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, part) counts its part of the row's tokens in the line of `counts` [lines, vocab] int32."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if (word_of(fields, row) & _PENALTIES) != 0:
        counts += line * vocab
        tokens += row * token_stride
        length = tl.load(num_tokens + line).to(tl.int32)
        prompt_length = field(fields, row, PROMPT_LENGTH)
        first = _first_position(tl.load(repetitions + row), prompt_length) + tl.program_id(1) * BLOCK
        for start in range(first, length, tl.num_programs(1) * BLOCK):
            positions = start + tl.arange(0, BLOCK)
            columns = tl.load(tokens + positions, mask=positions < length, other=vocab)
            known = (columns >= 0) & (columns < vocab)
            is_output = positions >= prompt_length
            tl.atomic_add(counts + columns, 1, mask=known & is_output, sem="relaxed")
            tl.atomic_or(counts + columns, _SEEN, mask=known & ~is_output, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens"])
def penalise_kernel(
    rows, fields, tokens, token_stride, num_tokens, repetitions, frequencies, presences, counts,
    work, vocab, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (line, part) penalises its part of the row's tokens in the line of `work`, each of them once."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if (word_of(fields, row) & _PENALTIES) != 0:
        counts += line * vocab
        work += line * vocab
        tokens += row * token_stride
        length = tl.load(num_tokens + line).to(tl.int32)
        repetition = tl.load(repetitions + row)
        frequency = tl.load(frequencies + row)
        presence = tl.load(presences + row)
        first = _first_position(repetition, field(fields, row, PROMPT_LENGTH)) + tl.program_id(1) * BLOCK
        for start in range(first, length, tl.num_programs(1) * BLOCK):
            positions = start + tl.arange(0, BLOCK)
            columns = tl.load(tokens + positions, mask=positions < length, other=vocab)
            known = (columns >= 0) & (columns < vocab)
            count = tl.atomic_xchg(counts + columns, 0, mask=known, sem="relaxed")
            is_mine = known & (count != 0)
            times = (count & (_SEEN - 1)).to(tl.float32)
            values = tl.load(work + columns, mask=is_mine, other=0.0)
            values = tl.where(values > 0, tl.div_rn(values, repetition), values * repetition)
            values = values - frequency * times
            values = values - tl.where(times > 0, presence, 0.0)
            tl.store(work + columns, values, mask=is_mine)
