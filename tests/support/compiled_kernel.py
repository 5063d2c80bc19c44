"""Triton kernels compiled ahead for a GPU that need not be here. Importing this imports Triton."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from eagleray.parallel.platform import LAUNCH

RESERVED = 1 << 10  # bytes of a multiprocessor that no program can have
POINTERS = {
    "*bf16": ("q", "k_cache", "v_cache", "out", "x", "weight"),
    "*i32": ("table", "splits", "work", "turns", "arrived"),
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
