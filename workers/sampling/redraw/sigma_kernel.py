"""Kernel of top-n-sigma: `top_n_sigma.py`, integer by integer."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.workers.sampling import top_n_sigma
from eagleray.workers.sampling.redraw.fields import word_of
from eagleray.workers.sampling.table import Feature

_TOP_N_SIGMA = tl.constexpr(int(Feature.TOP_N_SIGMA))
_WIDEST = tl.constexpr(top_n_sigma.WIDEST)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _step_scale(widest):
    """`top_n_sigma.step_scales` of one line."""
    exponent = tl.minimum(tl.maximum(widest, 0.0), _WIDEST).to(tl.int32, bitcast=True) >> 23
    return (tl.minimum(273 - exponent, 254) << 23).to(tl.float32, bitcast=True)


@triton.jit
def top_n_sigma_kernel(rows, fields, sigmas, work, vocab, TILE: tl.constexpr, PDL: tl.constexpr):
    """One program a line masks what is too far below the highest logit of its line of `work` [lines, vocab] float32."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    line = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + line).to(tl.int64)
    if (word_of(fields, row) & _TOP_N_SIGMA) != 0:
        work += line * vocab
        lanes = tl.arange(0, TILE)
        most = tl.full([TILE], -_INFINITY, tl.float32)
        least = tl.full([TILE], _INFINITY, tl.float32)
        for start in range(0, vocab, TILE):
            values = tl.load(work + start + lanes, mask=start + lanes < vocab, other=-_INFINITY)
            most = tl.maximum(most, values)
            least = tl.minimum(least, tl.where(values == -_INFINITY, _INFINITY, values))
        highest = tl.max(most, 0)
        scale = _step_scale(highest - tl.min(least, 0))
        counts = tl.zeros([TILE], tl.int32)
        totals = tl.zeros([TILE], tl.int64)
        squares = tl.zeros([TILE], tl.int64)
        for start in range(0, vocab, TILE):
            values = tl.load(work + start + lanes, mask=start + lanes < vocab, other=-_INFINITY)
            is_there = values > -_INFINITY
            steps = (tl.minimum(highest - values, _WIDEST) * scale + 0.5).to(tl.int64)
            steps = tl.where(is_there, steps, 0)
            counts += is_there.to(tl.int32)
            totals += steps
            squares += steps * steps
        count = tl.maximum(tl.sum(counts, 0), 1).to(tl.float64)
        mean = tl.sum(totals, 0).to(tl.float64) / count
        variance = tl.sum(squares, 0).to(tl.float64) / count - mean * mean
        deviation = tl.sqrt(tl.where(variance > 0, variance, 0.0)) / scale.to(tl.float64)
        cut = (highest.to(tl.float64) - tl.load(sigmas + row) * deviation).to(tl.float32)
        for start in range(0, vocab, TILE):
            values = tl.load(work + start + lanes, mask=start + lanes < vocab, other=_INFINITY)
            tl.store(work + start + lanes, -_INFINITY, mask=values < cut)
