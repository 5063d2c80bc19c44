"""Which backend a layer gets, and that attention calls it with the layer and nothing else."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention import flash
from eagleray.workers.attention.backends import BACKENDS, choose_backend
from eagleray.workers.attention.context import AttentionBackend, ForwardContext, PagedKVLayer, forward_context
from eagleray.workers.attention.flash import FlashBackend
from eagleray.workers.attention.reference import ReferenceBackend
from support.attention_requests import Requests

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16 = torch.bfloat16
HOPPER, AMPERE = (9, 0), (8, 0)


def spec(**changes: Any) -> AttentionSpec:
    return AttentionSpec(**{"num_heads": 6, "num_kv_heads": 2, "head_size": 64, "scale": 0.4, **changes})


PLAIN, CAPPED, WITH_SINKS = spec(), spec(logits_soft_cap=30.0), spec(has_sinks=True)
FLASH, VARLEN, REFERENCE = "FlashAttention-3", "Triton varlen", "plain PyTorch"


@pytest.mark.parametrize(
    ("of", "dtype", "device", "capability", "expected"),
    [
        (PLAIN, BF16, CUDA, HOPPER, [FLASH, VARLEN, REFERENCE]),
        (PLAIN, BF16, CUDA, AMPERE, [VARLEN, REFERENCE]),
        (CAPPED, BF16, CUDA, HOPPER, [VARLEN, REFERENCE]),
        (WITH_SINKS, torch.float16, CUDA, HOPPER, [VARLEN, REFERENCE]),
        (spec(head_size=80), BF16, CUDA, HOPPER, [FLASH, REFERENCE]),
        (spec(head_size=80), BF16, CUDA, AMPERE, [REFERENCE]),
        (PLAIN, torch.float32, CUDA, HOPPER, [REFERENCE]),
        (PLAIN, BF16, CPU, HOPPER, [REFERENCE]),
    ],
)
def test_a_layer_gets_the_first_backend_that_supports_it(
    of: AttentionSpec,
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
    expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if there were such a GPU with FlashAttention-3 here; in whatever order the backends stand."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from eagleray.workers.attention.varlen import VarlenBackend

    monkeypatch.setattr(flash, "flash_attn_interface", object())
    found = SimpleNamespace(multi_processor_count=1, shared_memory_per_multiprocessor=1, major=capability[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    backends: list[AttentionBackend] = [FlashBackend(), VarlenBackend(), ReferenceBackend()]
    assert [backend.name for backend in backends if backend.supports(of, dtype, device)] == expected
    assert choose_backend(of, dtype, device, backends).name == expected[0]
    assert choose_backend(of, dtype, device, backends[::-1]).name == expected[-1]


def test_there_is_a_backend_for_every_layer() -> None:
    """The fastest first, and the one that computes anything last."""
    names = [backend.name for backend in BACKENDS]
    assert names == [name for name in (FLASH, VARLEN, REFERENCE) if name in names]
    assert choose_backend(spec(head_size=7, has_sinks=True), torch.float64, CPU).name == REFERENCE


def test_what_asks_the_host_is_not_captured() -> None:
    assert not ReferenceBackend().capturable
    assert FlashBackend().capturable


def test_the_op_calls_the_layers_own_backend_with_the_layer() -> None:
    calls: list[PagedKVLayer] = []

    class Watched(ReferenceBackend):
        def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
            calls.append(layer)
            return super().__call__(q, layer)

    layers = [Requests([(3, 5)], PLAIN).layer(backend) for backend in (Watched(), ReferenceBackend(), Watched())]
    q, k = torch.zeros(3, 6, 64), torch.zeros(3, 2, 64)
    with forward_context(ForwardContext(layers)):
        for index in range(3):
            torch.ops.eagleray.attention(q, k, k, index)
    assert [id(layer) for layer in calls] == [id(layers[0]), id(layers[2])]
