"""The kernels on CUDA in bfloat16, in real shapes and odd ones, against plain versions of higher precision.

`tests/models/test_kernels.py` and `tests/workers/test_decode_attention.py` have the same cases in Triton's interpreter;
it multiplies no bfloat16.
"""

from importlib.util import find_spec
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention import choose_backend, reference_attention
from eagleray.workers.context import AttentionBackend
from eagleray.workers.decode_attention import launch_constants
from eagleray.workers.decode_backend import DecodeBackend
from eagleray.workers.flash_attention import flash_attention
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


# Decodes by the kernel itself, with the launch that the engine uses.


def decodes(lengths: list[int], of: AttentionSpec, block_size: int = 128) -> DecodeBatch:
    return DecodeBatch(lengths, of, block_size, BF16, device=CUDA)


@pytest.mark.parametrize("fine_below", [FINE, COARSE], ids=["in chunks", "in sections"])
@pytest.mark.parametrize("name", SPECS)
def test_decodes(name: str, fine_below: int) -> None:
    batch = decodes(LENGTHS, SPECS[name])
    check(batch, batch.run(fine_below, tile=launch_constants(batch.spec, len(batch.lens)).tile))


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("block_size", [16, 128])
def test_decodes_with_window_and_soft_cap(head_size: int, block_size: int) -> None:
    batch = decodes([1, 127, 128, 129, 1300, 5000], spec(head_size=head_size, **BOTH), block_size)
    check(batch, batch.run(tile=launch_constants(batch.spec, len(batch.lens)).tile))


@pytest.mark.parametrize("head_size", [64, 256])
def test_how_the_work_is_shared_changes_no_bit(head_size: int) -> None:
    batch = decodes([3000, 1500, 700, 1], spec(head_size=head_size))
    tile = launch_constants(batch.spec, len(batch.lens)).tile
    assert torch.equal(batch.run(FINE, tile=tile), batch.run(COARSE, tile=tile))


# Slices through the op, with each backend behind it.

MIXED = [(1, 300), (17, 17), (1, 1), (129, 400), (1, 1100), (20, 1001)]  # tokens in this batch, and of the request
SINGLE = [(1, n) for n in (1, 2, 127, 128, 129, 300, 1025, 1500)]
BACKENDS = [
    "plain",
    pytest.param(
        "flash",
        marks=pytest.mark.skipif(find_spec("flash_attn_interface") is None, reason="FlashAttention-3 is not installed"),
    ),
]
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


def check_op(requests: Requests, backend: AttentionBackend) -> None:
    out = requests.run(backend=backend)
    torch.testing.assert_close(out.float().cpu(), requests.expected(), atol=LIMIT, rtol=LIMIT)


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_any_length(backend: str, feature: str, head_size: int, block_size: int) -> None:
    of = spec(num_heads=6, head_size=head_size, scale=head_size**-0.5, **FEATURES[feature])
    if backend == "flash":
        assert choose_backend(of, BF16, CUDA) is flash_attention
    attend = flash_attention if backend == "flash" else reference_attention
    check_op(requests_of(MIXED, of, block_size), attend)


@pytest.mark.parametrize("head_size", [64, 96, 128, 256])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_decode_backend(feature: str, head_size: int) -> None:
    of = spec(num_heads=6, head_size=head_size, scale=head_size**-0.5, **FEATURES[feature])
    requests = requests_of(SINGLE, of, 128)
    backend = DecodeBackend(of, len(SINGLE), 2048, CUDA)
    backend.plan(requests.metadata.seq_lens)
    check_op(requests, backend.attend)
