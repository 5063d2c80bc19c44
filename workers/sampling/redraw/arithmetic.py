"""What kernels compute as the reference in PyTorch does, bit by bit: keys, pairs, masses, limits.

Kernels that use this are launched with `EXACT`: a product that is fused with a sum is rounded once and not twice, and
torch rounds twice.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from eagleray.parallel.platform import LAUNCH
from eagleray.workers.sampling import masses, packed_pairs
from eagleray.workers.sampling.kernels import tanh

EXACT = {**LAUNCH, "enable_fp_fusion": False}  # for launches

LOW = tl.constexpr(0xFFFFFFFF)
LOWEST = tl.constexpr(-(1 << 31))  # a key below that of every number
PAD = tl.constexpr(packed_pairs.PAD)
NOT_FINITE = tl.constexpr(packed_pairs.NOT_FINITE)
LOG2_E = tl.constexpr(masses.LOG2_E)
FARTHEST = tl.constexpr(masses.FARTHEST)
WITHOUT_MASS = tl.constexpr(32.0)  # nats below the highest: more than 45 octaves
P1 = tl.constexpr(masses.POWERS[1])
P2 = tl.constexpr(masses.POWERS[2])
P3 = tl.constexpr(masses.POWERS[3])
P4 = tl.constexpr(masses.POWERS[4])
P5 = tl.constexpr(masses.POWERS[5])


@triton.jit
def logits_of(raw, cap, HAS_CAP: tl.constexpr):
    """float32 logits of `raw` ones of the model's type, bent by a soft cap."""
    logits = raw.to(tl.float32)
    if HAS_CAP:
        logits = tanh(tl.div_rn(logits, cap)) * cap
    return logits


@triton.jit
def key_of(values):
    """float32 `values` as int32 that compare like them: the upper halves of `packed_pairs.pack`."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return ((bits >> 31) & 0x7FFFFFFF) ^ bits


@triton.jit
def value_of(keys):
    """The float32 values that int32 `keys` stand for."""
    return (((keys >> 31) & 0x7FFFFFFF) ^ keys).to(tl.float32, bitcast=True)


@triton.jit
def pair_of(keys, token_ids):
    """`packed_pairs.pack`, of keys; both int32."""
    return (keys.to(tl.int64) << 32) | (token_ids.to(tl.int64) ^ LOW)


@triton.jit
def key_of_pair(pairs):
    return (pairs >> 32).to(tl.int32)


@triton.jit
def id_of_pair(pairs):
    return (~pairs & LOW).to(tl.int32)


@triton.jit
def is_marked(pair):
    """Whether a line's pair says that a logit is not finite."""
    return (pair >> 32) == NOT_FINITE


@triton.jit
def token_masses(values, highest):
    """`masses.token_masses`: int64 of float32 `values` beside the `highest` of their line."""
    octaves = (highest - values) * LOG2_E
    octaves = tl.where(octaves < FARTHEST, octaves, FARTHEST)
    steps = (octaves * 1048576.0).to(tl.int32)
    f = (steps & 1048575).to(tl.float32) * (1.0 / 1048576.0)
    power = f * P5 + P4
    power = power * f + P3
    power = power * f + P2
    power = power * f + P1
    power = power * f + 1.0
    return ((power * 16777216.0).to(tl.int64) << 20) >> (steps >> 20).to(tl.int64)


@triton.jit
def mass_limit(top_p, total):
    """`masses.mass_limits` of a `top_p` float64 below 1 and a total int64."""
    return tl.maximum(tl.ceil(top_p * total.to(tl.float64)).to(tl.int64), 1)
