"""The fused kernels against the layers in PyTorch: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from torch.nn import functional as F

from eagleray.models.layers import rotate
from support.interpreter import DEVICE, RUNS_KERNELS, run_in_interpreter

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.models import kernels
    from eagleray.workers import kv_kernels

    def random(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)

    @pytest.mark.parametrize("size", [64, 96, 576, 5000])
    @pytest.mark.parametrize("with_residual", [True, False])
    def test_add_and_norm(size: int, with_residual: bool) -> None:
        x, weight = random(5, size), random(size, seed=1)
        residual = random(5, size, seed=2) if with_residual else None
        total = x if residual is None else x + residual
        normed, kept = kernels.add_rms_norm(x, residual, weight, 1e-5)
        torch.testing.assert_close(kept, total)
        torch.testing.assert_close(normed, F.rms_norm(total, (size,), weight, 1e-5), atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("size", [48, 1024, 1500])
    def test_silu_and_multiply(size: int) -> None:
        gate_up = random(3, 2 * size)
        gate, up = gate_up.chunk(2, dim=-1)
        torch.testing.assert_close(kernels.silu_mul(gate_up), F.silu(gate) * up, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize(("num_q", "num_k", "head_size"), [(9, 3, 64), (1, 1, 96), (16, 8, 128), (3, 1, 256)])
    def test_rotation(num_q: int, num_k: int, head_size: int) -> None:
        sizes = [num_q * head_size, num_k * head_size, num_k * head_size]
        merged = random(4, sum(sizes))
        rotation = random(4, 1, head_size, seed=1), random(4, 1, head_size, seed=2)
        q, k, v = merged.split(sizes, dim=-1)
        expected, untouched = (rotate(q, rotation), rotate(k, rotation)), v.clone()
        kernels.rotate_(q, k, *rotation)
        torch.testing.assert_close(q, expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(k, expected[1], atol=1e-5, rtol=1e-5)
        assert torch.equal(v, untouched)

    @pytest.mark.parametrize(("num_heads", "head_size"), [(1, 64), (3, 96), (8, 128)])
    def test_keys_and_values_go_into_their_slots(num_heads: int, head_size: int) -> None:
        merged = random(6, 3, num_heads, head_size)
        k, v = merged[:, 1], merged[:, 2]  # rows further apart than they are long
        ours = random(2, 4, 8, num_heads, head_size, seed=1)
        expected = ours.clone()
        slots = torch.tensor([31, 0, 7, 8, 20], device=DEVICE)  # the last token is padding
        for cache, new in zip(expected.flatten(1, 2), (k, v), strict=True):
            cache[slots] = new[:5]
        kv_kernels.write_kv(k, v, ours, slots)
        assert torch.equal(ours, expected)
