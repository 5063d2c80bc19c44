"""The probability mass of a token as an integer, so that sums do not depend on their order.

Top-p asks whether the mass before a token is below a share of the total. In integers that has one answer, on any number
of ranks and in any kernel, so everybody keeps the same set. `kernels` compute the same integers, operation by operation
(`redraw/arithmetic.py`): each is rounded as IEEE 754 says, and none is fused with the next.

A unit is 2**-44 of the mass of the likeliest token, whose own is 2**44; a token 45 octaves (31.2 nats) below it has
none. Sums of up to 2**18 tokens, and of any vocabulary below 2**19, fit in 63 bits.
"""

import torch
from torch import Tensor

MAX_VOCAB = 2**19 - 1
LOG2_E = 1.442695021629333  # log2(e) as a float32
FARTHEST = 63.0  # octaves; from 45 on there is no mass
# 2**-f for f in [0, 1), by rising powers of f, as float32: a minimax fit of the relative error, which is below 2.5e-7
POWERS = (
    1.0,
    -0.6931437253952026,
    0.2401801496744156,
    -0.0552973598241806,
    0.00920579768717289,
    -0.0009449035860598087,
)
WITHOUT_LIMIT = 2**63 - 1


def token_masses(values: Tensor, highest: Tensor) -> Tensor:
    """Masses [n, width] int64 of tokens with `values` [n, width] float32, where `highest` [n, 1] is the likeliest.

    A masked token has none, nor has any where all are masked.
    """
    octaves = (highest - values).mul_(LOG2_E)
    octaves = torch.where(octaves < FARTHEST, octaves, FARTHEST)  # also where they are NaN, minus infinity less itself
    steps = octaves.mul_(2**20).to(torch.int32)
    f = (steps & (2**20 - 1)).to(torch.float32).mul_(2.0**-20)
    power = torch.full_like(f, POWERS[-1])
    for coefficient in POWERS[-2::-1]:
        power.mul_(f).add_(coefficient)
    masses = power.mul_(2.0**24).to(torch.int64)
    return masses.bitwise_left_shift_(20).bitwise_right_shift_(steps >> 20)


def mass_limits(top_p: Tensor, totals: Tensor) -> Tensor:
    """The limits [n] int64 for `top_p` [n] float64 of `totals` [n] int64: a token stays if the mass before it is less.

    A `top_p` of infinity sets none. The likeliest token always stays.
    """
    limits = (top_p.clamp(max=1.0) * totals.to(torch.float64)).ceil().to(torch.int64).clamp_(min=1)
    return limits.masked_fill_(top_p == torch.inf, WITHOUT_LIMIT)
