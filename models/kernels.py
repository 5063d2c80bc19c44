"""Triton kernels of small layers (norms, rotary positions, activations), one launch each. `layers.py` has the same in
PyTorch.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.platform import LAUNCH, OVERLAP

COLUMNS_AT_ONCE = 1024


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, normed, total, eps, size,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * size
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weights = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    values = tl.load(x + row + columns, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        values = values.to(tl.float32) + tl.load(residual + row + columns, mask=inside, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)  # the sum is kept in this precision, and normed as it is kept
        tl.store(total + row + columns, values, mask=inside)
    values = values.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values) / size + eps)
    tl.store(normed + row + columns, (values * scale * weights).to(normed.dtype.element_ty), mask=inside)


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of `x + residual`, and the sum; both `[n, size]`, like `x`, which is contiguous."""
    normed = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    size = x.shape[-1]
    block = triton.next_power_of_2(size)
    _rms_norm_kernel[(x.numel() // size,)](
        x,
        residual,
        weight,
        normed,
        total,
        eps,
        size,
        residual is not None,
        block,
        OVERLAP,
        num_warps=max(1, min(16, block // 512)),
        **LAUNCH,
    )
    return normed, total


@triton.jit
def _silu_mul_kernel(gate_up, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=inside, other=0.0)
    activated = (gate / (1.0 + tl.exp(-gate))).to(up.dtype)
    tl.store(out + row * size + columns, activated * up, mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[n, 2 * size]`, gate first: `[n, size]`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, size)
    _silu_mul_kernel[(rows, triton.cdiv(size, COLUMNS_AT_ONCE))](
        gate_up, out, size, COLUMNS_AT_ONCE, OVERLAP, num_warps=4, **LAUNCH
    )
    return out
