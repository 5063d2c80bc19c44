"""How kernels read a row's fields, which `row_lists.py` writes."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from eagleray.workers.sampling.redraw import row_lists
from eagleray.workers.sampling.table import Feature

WORD = tl.constexpr(row_lists.WORD)
PROMPT_LENGTH = tl.constexpr(row_lists.PROMPT_LENGTH)
MIN_TOKENS = tl.constexpr(row_lists.MIN_TOKENS)
NUM_LOGPROBS = tl.constexpr(row_lists.NUM_LOGPROBS)
NUM_BIAS = tl.constexpr(row_lists.NUM_BIAS)
NUM_STOP = tl.constexpr(row_lists.NUM_STOP)
NUM_BAD_WORDS = tl.constexpr(row_lists.NUM_BAD_WORDS)
LONGEST_BEGINNING = tl.constexpr(row_lists.LONGEST_BEGINNING)
_NUM_FIELDS = tl.constexpr(row_lists.NUM_FIELDS)
_REDRAWN = tl.constexpr(int(sum(Feature) & ~(Feature.RANDOM | Feature.LOGPROBS)))

# a line's state in `narrow_kernels.py`, of eight numbers
IS_WIDE, LOW, LAST, ABOVE, LIMIT, TOTAL, HIGHEST = (tl.constexpr(place) for place in range(7))
NUM_STATES = tl.constexpr(8)


@triton.jit
def field(fields, row, WHICH: tl.constexpr):
    """One of the constants above, of `row` int64."""
    return tl.load(fields + row * _NUM_FIELDS + WHICH)


@triton.jit
def word_of(fields, row):
    """The features that `row` int64 asks for, as bits."""
    return field(fields, row, WORD)


@triton.jit
def is_redrawn(word):
    """Whether a row with this word asks for more than `kernels.py` draws; log-probabilities change no draw."""
    return (word & _REDRAWN) != 0
