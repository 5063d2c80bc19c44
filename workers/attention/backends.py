"""The Triton decode kernel as an attention backend, planned once per step and used by every layer of a kind."""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.parallel.platform import HAS_TRITON, runs_triton
from eagleray.workers.attention.context import AttentionBackend, AttentionMetadata

if HAS_TRITON:
    from eagleray.workers.attention.decode import allocate_workspace, attend_planned, plan_decode

HEAD_SIZES = (64, 96, 128, 256)


def supports(spec: AttentionSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel computes decodes of such a layer here: in 16 bits, or, in the interpreter, in float32."""
    dtypes = (torch.bfloat16, torch.float16) if device.type == "cuda" else (torch.float32,)
    return runs_triton(device) and dtype in dtypes and spec.head_size in HEAD_SIZES


class DecodeBackend:
    """Attention of one token per request, for layers of one spec."""

    def __init__(self, spec: AttentionSpec, max_requests: int, max_seq_len: int, device: torch.device) -> None:
        self._spec = spec
        self._workspace = allocate_workspace(max_requests, max_seq_len, spec, device)

    def plan(self, seq_lens: Tensor) -> None:
        """Share out the work of a step, whose requests have `seq_lens` [n] int32 tokens."""
        plan_decode(self._workspace, seq_lens, self._spec)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """An `AttentionBackend`, for the step that was planned last."""
        return attend_planned(q, k_cache, v_cache, metadata.block_table, spec, self._workspace, sinks=sinks)

    def attend_into(
        self,
        out: Tensor,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        block_table: Tensor,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> None:
        """The same into the first lines of `out`, but for those whose request has length 0."""
        attend_planned(q, k_cache, v_cache, block_table, spec, self._workspace, sinks=sinks, into=out)


class MixedBackend:
    """Attention of chunks of any length: those of one token by the decode kernel, the rest by another backend."""

    def __init__(self, decode: DecodeBackend, other: AttentionBackend) -> None:
        self._decode, self._other = decode, other

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """An `AttentionBackend`, once the chunks of one token were planned."""
        n = metadata.num_single
        if n == 0:
            return self._other(q, k_cache, v_cache, metadata, spec, sinks)
        if metadata.rest is None:
            return self._decode.attend(q, k_cache, v_cache, metadata, spec, sinks)
        out = self._other(q, k_cache, v_cache, metadata.rest, spec, sinks)
        self._decode.attend_into(out[:n], q[:n], k_cache, v_cache, metadata.block_table, spec, sinks)
        return out


class DecodeBackends:
    """One backend per kind of layer, where the kernel supports it; other layers keep the backend they have."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        others: Sequence[AttentionBackend],
        max_requests: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        kinds = {spec for spec in specs if supports(spec, dtype, device)}
        self._backends = {spec: DecodeBackend(spec, max_requests, max_seq_len, device) for spec in kinds}
        self.of_layers: list[AttentionBackend] = [
            self._backends[spec].attend if spec in self._backends else other
            for spec, other in zip(specs, others, strict=True)
        ]
        self.are_all = len(kinds) == len(set(specs))
        self.of_mixed_layers: list[AttentionBackend] = [
            MixedBackend(self._backends[spec], other).attend if spec in self._backends else other
            for spec, other in zip(specs, others, strict=True)
        ]

    def plan(self, seq_lens: Tensor) -> None:
        """Prepare a step for all of them: `seq_lens` [n] int32 of the requests with one token."""
        for backend in self._backends.values():
            backend.plan(seq_lens)
