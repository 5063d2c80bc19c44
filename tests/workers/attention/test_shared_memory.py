"""The decode kernel as compiled for GPUs of several generations asks for no more shared memory than those have."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import HOPPER, Processors
from eagleray.workers.attention import decode
from eagleray.workers.attention.decode_kernels import attend_kernel
from support.compiled_kernel import RESERVED, compiled_bytes

DEVICE = torch.device("cpu")
AMPERE, ADA = 164 << 10, 100 << 10  # bytes per multiprocessor


@pytest.mark.parametrize(
    ("have", "capability", "head_size"), [(ADA, 89, 128), (ADA, 89, 256), (AMPERE, 80, 128), (HOPPER, 90, 256)]
)
def test_decode_attention_fits(monkeypatch: pytest.MonkeyPatch, have: int, capability: int, head_size: int) -> None:
    """With one request, which takes the largest tiles."""
    monkeypatch.setattr(decode, "processors", lambda device: Processors(1, have, run_hopper_code=False))
    spec = AttentionSpec(num_heads=32, num_kv_heads=8, head_size=head_size, scale=1.0)
    launch = decode.launch_constants(spec, 1, DEVICE)
    constants = {
        "KV_HEADS": 8, "GROUP": 4, "GROUP_PAD": 16, "HEAD_SIZE": head_size, "HEAD_PAD": head_size, "BLOCK_SIZE": 128,
        "TILE": launch.tile, "HAS_CAP": False, "HAS_SINKS": False, "PDL": capability >= 90, "sinks": None,
        "EARLY_TILES": launch.early_tiles, "HEAD_BYTES": 2 * head_size, "LINES": 2 * head_size // 128,
    }  # fmt: skip
    needed = compiled_bytes(
        attend_kernel, capability, constants, num_warps=launch.num_warps, num_stages=launch.num_stages
    )
    assert 0 < needed <= have - RESERVED
