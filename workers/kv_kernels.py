"""Writing keys and values into the paged cache, both in one launch, in Triton."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from eagleray.parallel.overlap import OVERLAP


@triton.jit
def _write_kernel(k, v, cache, slots, k_stride, v_stride, side_stride, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    target = cache + slot * size + columns
    tl.store(target, tl.load(k + token * k_stride + columns, mask=inside), mask=inside)
    tl.store(target + side_stride, tl.load(v + token * v_stride + columns, mask=inside), mask=inside)


def write_kv(k: Tensor, v: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """As `attention.write_kv`; each token's heads lie side by side in `k` and `v`, and so do the cache's."""
    size = k.shape[1] * k.shape[2]
    block = triton.next_power_of_2(size)
    _write_kernel[(slot_mapping.shape[0],)](
        k, v, kv_cache, slot_mapping, k.stride(0), v.stride(0), kv_cache.stride(0), size, block, OVERLAP,
        num_warps=4, launch_pdl=OVERLAP,
    )  # fmt: skip
