"""Random-normal weights that form the same whole tensor however it is sharded.

Each value depends only on the seed, the tensor's name and its place in the whole tensor, so a rank computes its own
region and nothing else, on its own device.
"""

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.models.loading.parts import parts
from eagleray.parallel.weight_shard import WeightShard

STD = 0.02
_CHUNK = 1 << 24  # values at a time, to bound memory


def fill(name: str, shard: WeightShard, seed: int) -> None:
    """Fill `shard` of tensor `name` with `mean` plus normal noise of standard deviation 0.02."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little", signed=True)
    for part in parts(shard.target.shape, _CHUNK):
        starts = [cut.start + own.start for cut, own in zip(part, shard.region, strict=True)]
        target = shard.target[part]
        index = _places(shard.shape, starts, target.shape, target.device)
        target.copy_(_normal(index, key).mul_(STD).add_(shard.mean))


def _places(whole: Sequence[int], starts: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Where the values of a region of `shape` that begins at `starts` stand in the whole tensor, counted in order."""
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, start, length in zip(whole, starts, shape, strict=True):
        index = index.unsqueeze(-1) * size + torch.arange(start, start + length, device=device)
    return index


def _normal(index: Tensor, key: int) -> Tensor:
    """Standard normal float32 values by Box and Muller's transform of two 24-bit halves of a hash."""
    bits = _splitmix(index, key)
    radius = ((bits >> 40) & 0xFFFFFF).float().add_(1.0).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = (bits & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    return radius.mul_(angle.cos_())


def _splitmix(index: Tensor, key: int) -> Tensor:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) in int64, whose products wrap and whose shifts are masked."""
    bits = index * _signed(0x9E3779B97F4A7C15) + key
    bits ^= (bits >> 30) & (1 << 34) - 1
    bits *= _signed(0xBF58476D1CE4E5B9)
    bits ^= (bits >> 27) & (1 << 37) - 1
    bits *= _signed(0x94D049BB133111EB)
    return bits ^ ((bits >> 31) & (1 << 33) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64)
