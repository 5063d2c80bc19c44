"""What the fused kernels must compute, as the layers in PyTorch do, for any sizes, precision and device.

Importing this imports the kernels, so Triton decides by then whether to interpret them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.models import kernels
from eagleray.models.layers import rotate
from eagleray.workers import kv_kernels

# Against float32: of its own rounding, or of results, and of one product's factor, that are rounded to 8 bits.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


class Cases:
    """The cases on one device, in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=RTOL[self._dtype])

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self._device, self._dtype)

    def add_and_norm(self, rows: int, size: int, with_residual: bool) -> None:
        x, weight = self.random(rows, size), self.random(size, seed=1)
        residual = self.random(rows, size, seed=2) if with_residual else None
        total = x if residual is None else x + residual
        normed, kept = kernels.add_rms_norm(x, residual, weight, 1e-5)
        torch.testing.assert_close(kept, total)
        expected = F.rms_norm(total.float(), (size,), weight.float(), 1e-5)
        self._compare(normed, expected)

    def silu_and_multiply(self, rows: int, size: int) -> None:
        gate_up = self.random(rows, 2 * size)
        gate, up = gate_up.float().chunk(2, dim=-1)
        self._compare(kernels.silu_mul(gate_up), F.silu(gate) * up)

    def rotation(self, rows: int, num_q: int, num_k: int, head_size: int) -> None:
        sizes = [num_q * head_size, num_k * head_size, num_k * head_size]
        merged = self.random(rows, sum(sizes))
        rotation = (self.random(rows, 1, head_size, seed=1).float(), self.random(rows, 1, head_size, seed=2).float())
        q, k, v = merged.split(sizes, dim=-1)
        expected, untouched = (rotate(q.float(), rotation), rotate(k.float(), rotation)), v.clone()
        kernels.rotate_(q, k, *rotation)
        self._compare(q, expected[0])
        self._compare(k, expected[1])
        assert torch.equal(v, untouched)

    def keys_and_values_into_slots(self, num_heads: int, head_size: int) -> None:
        merged = self.random(6, 3, num_heads, head_size)
        k, v = merged[:, 1], merged[:, 2]  # rows further apart than they are long
        ours = self.random(2, 4, 8, num_heads, head_size, seed=1)
        expected = ours.clone()
        slots = torch.tensor([31, 0, 7, 8, 20], device=self._device)  # the last token is padding
        for cache, new in zip(expected.flatten(1, 2), (k, v), strict=True):
            cache[slots] = new[:5]
        kv_kernels.write_kv(k, v, ours, slots)
        assert torch.equal(ours, expected)
