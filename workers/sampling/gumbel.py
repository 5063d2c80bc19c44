"""Gumbel noise as a pure function of (request seed, position, token id): no generator, no state.

A request therefore draws the same token alone or among others, on one rank or many, at once or again after a replay.

The seed and the position give a 64-bit row key through SplitMix64's finaliser (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014). Its halves are the start and the odd step of a Weyl sequence over token
ids in 32 bits, and each element goes through the three-multiplication finaliser "triple32" of Wellons ("Prospecting for
hash functions", 2018), whose avalanche bias is close to that of a random function. Everything per token is 32-bit
arithmetic, which CPU vector units and GPUs do at full rate.

torch has no full unsigned integers, so numbers are kept in signed ones that wrap around; only right shifts need care.
"""

import torch
from torch import Tensor

from eagleray.workers.sampling.packed_pairs import line_blocks

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX64 = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_MIX32 = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
# 31 random bits r become u = (r + 1/2) * 2**-31 in (0, 1); the factor is one ulp less, so that u never rounds up to 1.
_UNIT = 2.0**-31 * (1 - 2.0**-24)


def mixed_seed(seed: int) -> int:
    """`seed` (taken modulo 2**64) scrambled, as a signed 64-bit integer: what a table keeps for `row_keys`.

    Neighbouring seeds would otherwise share row keys at shifted positions.
    """
    z = (seed + _GOLDEN) & _MASK64
    for shift, factor in _MIX64:
        z = ((z ^ (z >> shift)) * factor) & _MASK64
    return _signed(z ^ (z >> 31), 64)


def row_keys(mixed_seeds: Tensor, positions: Tensor) -> Tensor:
    """Keys [n] int64 of the noise for `mixed_seeds` [n] int64 at `positions` [n] int64."""
    z = mixed_seeds + (positions + 1) * _signed(_GOLDEN, 64)
    for shift, factor in _MIX64:
        z = (z ^ _shift_right(z, shift, 64)) * _signed(factor, 64)
    return z ^ _shift_right(z, 31, 64)


def random_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """32 random bits [n, width] int32 for each of `token_ids` [1 or n, width] int32 under `keys` [n] int64."""
    step = (keys | 1).to(torch.int32).unsqueeze(1)
    start = (keys >> 32).to(torch.int32).unsqueeze(1)
    x = (token_ids * step).add_(start)
    shifted = torch.empty_like(x)
    for shift, factor in _MIX32:
        x.bitwise_xor_(_shift_right(x, shift, 32, out=shifted)).mul_(_signed(factor, 32))
    return x.bitwise_xor_(_shift_right(x, 14, 32, out=shifted))


def log_exponential(keys: Tensor, token_ids: Tensor) -> Tensor:
    """log(E) [n, width] float32 of standard exponential variables E; -log(E) is standard Gumbel noise.

    E = -log1p(-u) with small u exact, so the upper tail of the Gumbel noise, which decides what is drawn, is right down
    to probabilities of 2**-31 and does not stop at the 2**-24 of a float32 close to 1.
    """
    u = random_bits(keys, token_ids).bitwise_and_(0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(-_UNIT)
    return u.log1p_().neg_().log_()


def add_gumbel_(values: Tensor, keys: Tensor, first_id: int) -> Tensor:
    """Adds noise to `values` [n, shard] in place; its columns are tokens from `first_id` on, `keys` [n] is per line."""
    token_ids = torch.arange(first_id, first_id + values.shape[1], dtype=torch.int32, device=values.device).unsqueeze(0)
    for block in line_blocks(values):
        values[block].sub_(log_exponential(keys[block], token_ids))
    return values


def _shift_right(x: Tensor, shift: int, bits: int, out: Tensor | None = None) -> Tensor:
    """Logical right shift: torch's copies the sign."""
    return torch.bitwise_right_shift(x, shift, out=out).bitwise_and_((1 << (bits - shift)) - 1)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value
