"""What the kernels that draw have in common: the floor of min-p, and noise."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from eagleray.workers.sampling import packed_pairs
from eagleray.workers.sampling.kernels import log_exponential, random_bits
from eagleray.workers.sampling.redraw.arithmetic import key_of, pair_of, value_of

_INFINITY = tl.constexpr(float("inf"))
_MASKED = tl.constexpr(packed_pairs.MASKED)  # the key of minus infinity


@triton.jit
def floor_of(highest, log_min_p):
    """The lowest key that min-p leaves; without min-p that of a masked token."""
    return tl.where(log_min_p == -_INFINITY, _MASKED, key_of(highest + log_min_p))


@triton.jit
def noisy_pairs(keys, token_ids, noise_key):
    """Pairs of values and their Gumbel noise."""
    noisy = value_of(keys) - log_exponential(random_bits(noise_key, token_ids))
    return pair_of(key_of(noisy), token_ids)
