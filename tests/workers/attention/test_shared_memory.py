"""Kernels as compiled for GPUs of several generations ask for no more shared memory than those have."""

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from eagleray.models.attention import AttentionSpec  # noqa: E402
from eagleray.parallel import skinny  # noqa: E402
from eagleray.parallel.overlap import LAUNCH  # noqa: E402
from eagleray.parallel.shared_memory import HOPPER  # noqa: E402
from eagleray.workers.attention import decode  # noqa: E402
from eagleray.workers.attention.decode_kernels import attend_kernel  # noqa: E402

DEVICE = torch.device("cpu")
RESERVED = 1 << 10  # bytes of a multiprocessor that no program can have
AMPERE, ADA = 164 << 10, 100 << 10  # bytes per multiprocessor
POINTERS = {
    "*bf16": ("q", "k_cache", "v_cache", "out", "x", "weight"),
    "*i32": ("table", "header", "work", "arrived"),
    "*fp32": ("partial", "partial_ml", "parts"),
    "fp32": ("scale", "cap"),
}


def compiled_bytes(kernel: Any, capability: int, constants: dict[str, Any], **options: int) -> int:
    """Shared memory of a program of `kernel`, compiled ahead for this compute capability."""
    types = {name: kind for kind, names in POINTERS.items() for name in names}
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in kernel.arg_names}
    sixteen = [["tt.divisibility", 16]]
    attributes = {(i,): sixteen for i, (_, kind) in enumerate(signature.items()) if kind not in ("constexpr", "fp32")}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    launch = {"enable_fp_fusion": LAUNCH["enable_fp_fusion"], **options}
    return int(triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch).metadata.shared)


@pytest.mark.parametrize(
    ("have", "capability", "head_size"), [(ADA, 89, 128), (ADA, 89, 256), (AMPERE, 80, 128), (HOPPER, 90, 256)]
)
def test_decode_attention_fits(monkeypatch: pytest.MonkeyPatch, have: int, capability: int, head_size: int) -> None:
    """With one request, which takes the largest tiles."""
    monkeypatch.setattr(decode, "shared_memory", lambda device: have)
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=head_size, scale=1.0)
    launch = decode.launch_constants(spec, 1, DEVICE)
    constants = {
        "KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": 16, "HEAD_SIZE": head_size, "HEAD_PAD": head_size, "BLOCK_SIZE": 128,
        "TILE": launch.tile, "HAS_CAP": False, "HAS_SINKS": False, "PDL": capability >= 90, "sinks": None,
    }  # fmt: skip
    needed = compiled_bytes(
        attend_kernel, capability, constants, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    assert 0 < needed <= have - RESERVED


@pytest.mark.parametrize(("rows", "columns", "gated"), [(64, 4096, False), (64, 28672, False), (64, 14336, True)])
def test_products_of_few_rows_fit(rows: int, columns: int, gated: bool) -> None:
    """On what `takes` wants; wider tiles for wider weights."""
    tile = skinny.tile_of(rows, columns, gated=gated)
    constants = {
        "ROWS": rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SPLITS": 1, "HAS_BIAS": False, "GATED": gated,
        "PDL": True, "bias": None,
    }  # fmt: skip
    needed = compiled_bytes(skinny._linear_kernel, 90, constants, num_warps=4, num_stages=tile.num_stages)
    assert 0 < needed <= HOPPER - RESERVED
