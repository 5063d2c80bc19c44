"""Attention backends: which of them a layer gets, and the decode kernel in front of it, planned once per step."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import HAS_TRITON, platform_of
from eagleray.workers.attention.context import KERNEL_HEAD_SIZES, AttentionBackend, PagedKVLayer
from eagleray.workers.attention.flash import FlashBackend
from eagleray.workers.attention.reference import ReferenceBackend

if HAS_TRITON:
    from eagleray.workers.attention.decode import allocate_workspace, attend_planned, plan_decode
    from eagleray.workers.attention.varlen import VarlenBackend

BACKENDS: list[AttentionBackend] = [FlashBackend(), *([VarlenBackend()] if HAS_TRITON else []), ReferenceBackend()]


def choose_backend(
    spec: AttentionSpec, dtype: torch.dtype, device: torch.device, backends: Sequence[AttentionBackend] = BACKENDS
) -> AttentionBackend:
    """The first of `backends`, of which the fastest come first, that computes such a layer on this device."""
    return next(backend for backend in backends if backend.supports(spec, dtype, device))


class DecodeBackend:
    """Attention of one token per request by the decode kernel, for layers of one spec."""

    name = "Triton decode"
    capturable = True

    def __init__(self, spec: AttentionSpec, max_requests: int, max_seq_len: int, device: torch.device) -> None:
        self._spec = spec
        self._workspace = allocate_workspace(max_requests, max_seq_len, spec, device)

    @staticmethod
    def supports(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether the kernel computes decodes of such a layer here: in 16 bits, or, in the interpreter, in float32."""
        platform = platform_of(device)
        dtypes = (torch.bfloat16, torch.float16) if platform.compiles_kernels else (torch.float32,)
        return platform.runs_kernels and dtype in dtypes and spec.head_size in KERNEL_HEAD_SIZES

    def plan(self, seq_lens: Tensor) -> None:
        """Share out the work of a step, whose requests have `seq_lens` [n] int32 tokens."""
        plan_decode(self._workspace, seq_lens, self._spec)

    def __call__(self, q: Tensor, layer: PagedKVLayer, into: Tensor | None = None) -> Tensor:
        """Attention in the step that was planned last; written to `into` if given, except for requests of length 0."""
        return attend_planned(q, layer, self._workspace, into)


class MixedBackend:
    """Attention of chunks of any length: those of one token by the decode kernel, the rest by another backend."""

    def __init__(self, decode: DecodeBackend, other: AttentionBackend) -> None:
        self._decode, self._other = decode, other
        self.name = f"{decode.name} + {other.name}"
        self.capturable = decode.capturable and other.capturable

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether both do."""
        return self._decode.supports(spec, dtype, device) and self._other.supports(spec, dtype, device)

    def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
        """Once the chunks of one token were planned."""
        n, rest = layer.metadata.num_single, layer.metadata.rest
        if n == 0:
            return self._other(q, layer)
        if rest is None:
            return self._decode(q, layer)
        out = self._other(q, replace(layer, metadata=rest))
        self._decode(q[:n], layer, into=out[:n])
        return out


class DecodeBackends:
    """One decode backend per kind of layer, where the kernel supports it; other layers keep the backend they have."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        others: Sequence[AttentionBackend],
        max_requests: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        kinds = dict.fromkeys(spec for spec in specs if DecodeBackend.supports(spec, dtype, device))
        self.by_spec = {spec: DecodeBackend(spec, max_requests, max_seq_len, device) for spec in kinds}
        self.of_layers: list[AttentionBackend] = [
            self.by_spec.get(spec, other) for spec, other in zip(specs, others, strict=True)
        ]
        self.are_all = len(kinds) == len(set(specs))
        self.of_mixed_layers: list[AttentionBackend] = [
            MixedBackend(self.by_spec[spec], other) if spec in self.by_spec else other
            for spec, other in zip(specs, others, strict=True)
        ]

    def plan(self, seq_lens: Tensor) -> None:
        """Prepare a step for all of them: `seq_lens` [n] int32 of the requests with one token."""
        for backend in self.by_spec.values():
            backend.plan(seq_lens)
