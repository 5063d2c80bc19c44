"""The kernels on CUDA in bfloat16, in real shapes and odd ones, against plain versions of higher precision.

The same kernels run in Triton's interpreter, in float32, in `tests/models/test_kernels.py` and in
`tests/workers/attention`: `test_kv_kernels.py`, `test_decode.py` and `test_varlen.py`; it multiplies no bfloat16.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

import triton

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention.backends import BACKENDS, DecodeBackend, choose_backend
from eagleray.workers.attention.context import AttentionBackend
from eagleray.workers.attention.decode import launch_constants
from eagleray.workers.attention.flash import FlashBackend
from eagleray.workers.attention.reference import ReferenceBackend
from eagleray.workers.attention.varlen import VarlenBackend
from support.attention_requests import Requests
from support.decode_batch import COARSE, FINE, LENGTHS, SPECS, DecodeBatch, check, spec
from support.gpu import needs_gpus
from support.kernel_cases import Cases

pytestmark = needs_gpus(1)

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
CASES = Cases(CUDA, BF16)
ROWS = [1, 3, 300]
BOTH: dict[str, Any] = {"sliding_window": 150, "logits_soft_cap": 1.5}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [64, 96, 576, 4096, 5000])
@pytest.mark.parametrize("with_residual", [True, False])
def test_add_and_norm(rows: int, size: int, with_residual: bool) -> None:
    CASES.add_and_norm(rows, size, with_residual)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("size", [48, 1024, 1500, 14336])
def test_silu_and_multiply(rows: int, size: int) -> None:
    CASES.silu_and_multiply(rows, size)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize(("num_q", "num_k", "head_size"), [(9, 3, 64), (1, 1, 96), (32, 8, 128), (3, 1, 256)])
def test_rotation_and_slots(num_q: int, num_k: int, head_size: int, rotates: bool) -> None:
    CASES.rotation_and_slots(num_q, num_k, head_size, rotates)


@pytest.mark.parametrize(("num_k", "head_size"), [(1, 96), (8, 128), (2, 256)])
def test_blocks_with_odd_numbers_are_marked_and_cleaned(num_k: int, head_size: int) -> None:
    CASES.marked_and_cleaned_blocks(num_k, head_size)


# Decodes by the kernel itself, with the launch that the engine uses.


def decodes(lengths: list[int], of: AttentionSpec, block_size: int = 128) -> DecodeBatch:
    return DecodeBatch(lengths, of, block_size, BF16, device=CUDA)


@pytest.mark.parametrize("lanes", [FINE, COARSE], ids=["in chunks", "in sections"])
@pytest.mark.parametrize("name", SPECS)
def test_decodes(name: str, lanes: int) -> None:
    batch = decodes(LENGTHS, SPECS[name])
    check(batch, batch.run(lanes, tile=launch_constants(batch.spec, len(batch.lens), batch.q.device).tile))


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 128])
def test_decodes_with_window_and_soft_cap(head_size: int, block_size: int) -> None:
    batch = decodes([1, 127, 128, 129, 1300, 5000], spec(head_size=head_size, **BOTH), block_size)
    check(batch, batch.run(tile=launch_constants(batch.spec, len(batch.lens), batch.q.device).tile))


@pytest.mark.parametrize("head_size", [64, 256])
def test_how_the_work_is_shared_changes_no_bit(head_size: int) -> None:
    batch = decodes([3000, 1500, 700, 1], spec(head_size=head_size))
    tile = launch_constants(batch.spec, len(batch.lens), batch.q.device).tile
    assert torch.equal(batch.run(FINE, tile=tile), batch.run(COARSE, tile=tile))


# Chunks through the op, with each backend behind it.

MIXED = [(1, 300), (17, 17), (1, 1), (129, 400), (1, 1100), (20, 1001)]  # tokens in this batch, and of the request
SINGLE = [(1, n) for n in (1, 2, 127, 128, 129, 300, 1025, 1500)]
PLAIN, VARLEN, FLASH = ReferenceBackend(), VarlenBackend(), FlashBackend()
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 150},
    "window of one token": {"sliding_window": 1},
    "soft cap": {"logits_soft_cap": 1.5},
    "window and soft cap": BOTH,
}
LIMIT = 1.6e-2  # weights and results have 8 bits


def requests_of(lengths: list[tuple[int, int]], of: AttentionSpec, block_size: int) -> Requests:
    return Requests(lengths, of, block_size=block_size, dtype=BF16, device="cuda")


def check_op(requests: Requests, backend: AttentionBackend, sinks: torch.Tensor | None = None) -> None:
    out = requests.run(backend=backend, sinks=sinks)
    torch.testing.assert_close(out.float().cpu(), requests.expected(sinks), atol=LIMIT, rtol=LIMIT)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", [PLAIN, VARLEN, FLASH], ids=["plain", "chunks", "flash"])
def test_chunks_of_any_length(backend: AttentionBackend, feature: str, head_size: int, block_size: int) -> None:
    of = spec(num_heads=6, head_size=head_size, scale=head_size**-0.5, **FEATURES[feature])
    if not backend.supports(of, BF16, CUDA):
        pytest.skip(f"{backend.name} does not compute such a layer here, or is not installed")
    check_op(requests_of(MIXED, of, block_size), backend)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_layer_gets_the_fastest_backend_that_computes_it(feature: str) -> None:
    of = spec(head_size=128, **FEATURES[feature])
    assert [backend.name for backend in BACKENDS] == [FLASH.name, VARLEN.name, PLAIN.name]
    fastest = FLASH.name if FLASH.supports(of, BF16, CUDA) else VARLEN.name
    assert choose_backend(of, BF16, CUDA).name == fastest
    assert choose_backend(of, torch.float32, CUDA).name == PLAIN.name


def test_a_soft_cap_is_not_for_flash_attention() -> None:
    """Its wheels are built without."""
    assert choose_backend(spec(head_size=256, logits_soft_cap=50.0), BF16, CUDA).name == "Triton varlen"


def test_sinks_are_not_for_flash_attention() -> None:
    assert choose_backend(spec(head_size=128, has_sinks=True), BF16, CUDA).name == "Triton varlen"


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (7, 1), (20, 1), (32, 8)])
def test_chunks_with_sinks_for_groups_of_any_size(num_heads: int, num_kv_heads: int) -> None:
    requests = requests_of(MIXED, spec(num_heads=num_heads, num_kv_heads=num_kv_heads, sliding_window=150), 128)
    check_op(requests, VARLEN, torch.linspace(-3, 6, num_heads, device=CUDA))


def test_padding_of_chunks_gives_zero() -> None:
    requests = requests_of(MIXED, spec(head_size=128), 128)
    out, padded = requests.run(backend=VARLEN), requests.run(padding=300, backend=VARLEN)
    assert torch.equal(padded[:-300], out)
    assert not padded[-300:].any()


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_decode_backend(feature: str, head_size: int) -> None:
    of = spec(num_heads=6, head_size=head_size, scale=head_size**-0.5, **FEATURES[feature])
    requests = requests_of(SINGLE, of, 128)
    backend = DecodeBackend(of, len(SINGLE), 2048, CUDA)
    backend.plan(requests.metadata.seq_lens)
    check_op(requests, backend)


@pytest.mark.parametrize("in_kernel", [False, True], ids=["plain", "decode"])
def test_sinks_of_single_tokens(in_kernel: bool) -> None:
    of = spec(num_heads=6, head_size=64, has_sinks=True, sliding_window=150)
    requests = requests_of(SINGLE, of, 128)
    decode = DecodeBackend(of, len(SINGLE), 2048, CUDA)
    decode.plan(requests.metadata.seq_lens)
    check_op(requests, decode if in_kernel else PLAIN, torch.linspace(-3, 6, 6, device=CUDA))


def test_kernels_are_compiled_ahead_without_a_launch() -> None:
    from eagleray.models import kernels  # these import Triton, which is not everywhere
    from eagleray.workers.graphs.compile_ahead import compile_ahead

    compiled: list[object] = []
    triton.knobs.runtime.jit_post_compile_hook = lambda **known: compiled.append(known)
    try:
        gate_up = torch.randn(3, 2 * 176, dtype=torch.float16, device=CUDA)
        outs: list[Tensor] = []
        assert compile_ahead([lambda: outs.append(kernels.silu_mul(gate_up))], CUDA) == len(compiled) == 1
        assert not outs[0].any()
        assert compile_ahead([lambda: outs.append(kernels.silu_mul(gate_up))], CUDA) == 0
        gate, up = gate_up.float().chunk(2, dim=-1)
        torch.testing.assert_close(kernels.silu_mul(gate_up).float(), F.silu(gate) * up, atol=1e-2, rtol=1e-2)
        assert len(compiled) == 1
    finally:
        triton.knobs.runtime.jit_post_compile_hook = None
