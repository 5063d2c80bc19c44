"""The cut of top-n-sigma, from sums of integers, so that it is the same on any number of ranks and in any kernel.

Distances to the line's highest logit are counted in steps of a power of two, so small that the widest distance has
2**19 to 2**20 of them. That changes the deviation in the tenth digit at most, since the rounding of distances is a
noise of a millionth of the range, and its variance less than a billionth of theirs. `redraw/sigma_kernel.py` computes
the same numbers, operation by operation.
"""

import torch
from torch import Tensor

from eagleray.parallel.group import TPGroup
from eagleray.workers.sampling.packed_pairs import line_blocks

WIDEST = 3.4028234663852886e38  # the largest float32


def drop_below_n_sigma(logits: Tensor, top_n_sigma: Tensor, tp: TPGroup) -> Tensor:
    """`logits` [n, shard] float32 of this rank, masked below `top_n_sigma` [n] float64 deviations from the highest."""
    is_masked = logits == -torch.inf
    lowest = logits.masked_fill(is_masked, torch.inf).amin(dim=-1)
    highest, negated = tp.all_reduce(torch.stack([logits.amax(dim=-1), -lowest]), "max")
    scale = step_scales(highest + negated)
    count, total, squares = tp.all_reduce(_moments(logits, highest, scale)).to(torch.float64)
    count = count.clamp(min=1)
    variance = (squares / count - (total / count).square()).clamp(min=0)
    cut = highest.to(torch.float64) - top_n_sigma * (variance.sqrt() / scale.to(torch.float64))
    return logits.masked_fill(logits < cut.to(torch.float32).unsqueeze(1), -torch.inf)


def step_scales(widest: Tensor) -> Tensor:
    """Powers of two [n] float32 that bring distances up to `widest` [n] float32 into [2**19, 2**20), or below."""
    exponents = widest.clamp(min=0, max=WIDEST).view(torch.int32) >> 23
    return ((273 - exponents).clamp(max=254) << 23).view(torch.float32)


def _moments(logits: Tensor, highest: Tensor, scale: Tensor) -> Tensor:
    """How many of `logits` [n, shard] are not masked, the sum of their distances in steps, and of the squares, [3, n]
    int64.
    """
    moments = []
    for block in line_blocks(logits):
        distances = (highest[block].unsqueeze(1) - logits[block]).clamp_(max=WIDEST)
        is_masked = logits[block] == -torch.inf
        steps = distances.mul_(scale[block].unsqueeze(1)).add_(0.5).to(torch.int64).masked_fill_(is_masked, 0)
        moments.append(torch.stack([(~is_masked).sum(dim=-1), steps.sum(dim=-1), steps.square().sum(dim=-1)]))
    return torch.cat(moments, dim=1)
