"""Small layers as one launch each, in Triton, for CUDA or its interpreter. `layers.py` has the same in PyTorch."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.overlap import OVERLAP

HEADS_AT_ONCE = 8
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
        launch_pdl=OVERLAP,
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
        gate_up, out, size, COLUMNS_AT_ONCE, OVERLAP, num_warps=4, launch_pdl=OVERLAP
    )
    return out


@triton.jit
def _rotate_kernel(
    q, k, cos, sin, q_stride, k_stride, num_q, num_k,
    HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    q_programs = tl.cdiv(num_q, HEADS)
    base, count = q + token * q_stride, num_q
    if tl.program_id(1) >= q_programs:
        base, count, first = k + token * k_stride, num_k, first - q_programs * HEADS
    heads = first + tl.arange(0, HEADS)
    pairs = tl.arange(0, BLOCK)
    inside = (heads < count)[:, None] & (pairs < HALF)[None, :]
    low = base + heads[:, None] * (2 * HALF) + pairs[None, :]
    angles = token * 2 * HALF + pairs
    known = pairs < HALF
    x, y = tl.load(low, mask=inside, other=0.0), tl.load(low + HALF, mask=inside, other=0.0)
    x32, y32 = x.to(tl.float32), y.to(tl.float32)
    cos_x, sin_x = tl.load(cos + angles, mask=known, other=0.0), tl.load(sin + angles, mask=known, other=0.0)
    cos_y, sin_y = (
        tl.load(cos + angles + HALF, mask=known, other=0.0),
        tl.load(sin + angles + HALF, mask=known, other=0.0),
    )
    tl.store(low, (x32 * cos_x[None, :] + y32 * sin_x[None, :]).to(x.dtype), mask=inside)
    tl.store(low + HALF, (y32 * cos_y[None, :] + x32 * sin_y[None, :]).to(x.dtype), mask=inside)


def rotate_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn each head of `q` and `k`, `[tokens, heads * head_size]`, in place; rows need not be contiguous.

    `cos` and `sin` are `[tokens, 1, head_size]` float32, the first half of the sines negated.
    """
    head_size = cos.shape[-1]
    num_q, num_k = q.shape[1] // head_size, k.shape[1] // head_size
    half = head_size // 2
    programs = triton.cdiv(num_q, HEADS_AT_ONCE) + triton.cdiv(num_k, HEADS_AT_ONCE)
    _rotate_kernel[(q.shape[0], programs)](
        q,
        k,
        cos,
        sin,
        q.stride(0),
        k.stride(0),
        num_q,
        num_k,
        half,
        triton.next_power_of_2(half),
        HEADS_AT_ONCE,
        OVERLAP,
        num_warps=4,
        launch_pdl=OVERLAP,
    )
