"""Collectives of small messages between GPUs of one node, over memory that all ranks reach (torch symmetric memory).

Few numbers go through inboxes (`low_latency_reduce.py`). More are added up by torch's kernels. One-shot: each rank
reads everybody's message and adds it up. Two-shot: each rank adds up its part and reads the other parts. None of them
uses NVLink multicast or threads of its own.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

from eagleray.parallel.platform import HAS_TRITON

if HAS_TRITON:
    from eagleray.parallel import low_latency_reduce

DTYPES = (torch.bfloat16, torch.float32)  # that torch's kernels add up
ONE_SHOT_BYTES = 256 * 1024  # measured on four H200: beyond it two shots are faster
MAX_BYTES = 8 * 1024 * 1024  # and beyond this one, with its copies, NCCL is
MAX_PAIRS = 8192


class SymmetricMemory:
    """Buffers of one rank, each used by one collective after the other. Every rank makes the same calls in order."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """A collective call. Raises `RuntimeError` where the GPUs cannot reach each other's memory."""
        self._group = group
        self._device = device
        self._buffer = symm_mem.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self._buffer, group.group_name)
        self._pairs = self._inboxes(*low_latency_reduce.lines_of_pairs(MAX_PAIRS))
        self._rows: dict[
            int, low_latency_reduce.Inboxes
        ] = {}  # by the words of a row; made on first use, before any graph

    def _inboxes(self, lines: int, words: int) -> "low_latency_reduce.Inboxes":
        return low_latency_reduce.Inboxes.join(self._group, lines, words, self._device)

    def takes(self, x: Tensor, op: str) -> bool:
        """Whether the kernels reduce such a message: pairs, or a small sum cut into 16-byte words for each rank."""
        if op == "max":
            return x.dtype == torch.int64 and x.dim() == 1 and x.numel() <= MAX_PAIRS
        return x.dtype in DTYPES and x.nbytes <= MAX_BYTES and x.nbytes % 256 == 0

    def all_reduce(self, x: Tensor, op: str) -> Tensor:
        """The sum or maximum over all ranks, bitwise equal on all of them."""
        if op == "max":
            return low_latency_reduce.highest(self._pairs, x)
        return self._one_shot(x) if x.nbytes <= ONE_SHOT_BYTES else self._two_shot(x).clone()

    def add_up(self, x: Tensor) -> None:
        """The same sum, in `x`."""
        x.copy_(self._one_shot(x) if x.nbytes <= ONE_SHOT_BYTES else self._two_shot(x))

    def _one_shot(self, x: Tensor) -> Tensor:
        """Not by `one_shot_all_reduce_copy`: its first warp tells other ranks of copies that later warps still make."""
        buffer, name = self._part_of_buffer(x).copy_(x), self._group.group_name
        return torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)  # type: ignore[no-any-return]

    def _two_shot(self, x: Tensor) -> Tensor:
        """In the buffer, until the next collective."""
        buffer = self._part_of_buffer(x).copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self._group.group_name)
        return buffer

    def _part_of_buffer(self, x: Tensor) -> Tensor:
        return self._buffer.view(x.dtype)[: x.numel()].view_as(x)

    def takes_rms_norm(self, x: Tensor) -> bool:
        """Whether `all_reduce_rms_norm` works on such rows."""
        return (
            x.shape[0] <= low_latency_reduce.MAX_ROWS
            and x.dtype in (torch.bfloat16, torch.float16)
            and x.shape[1] % 8 == 0
        )

    def all_reduce_rms_norm(
        self, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """As `TPGroup.all_reduce_rms_norm`."""
        words = x.shape[1] // 2
        if words not in self._rows:
            self._rows[words] = self._inboxes(low_latency_reduce.lines_of_sums(self._group.size()), words)
        return low_latency_reduce.all_reduce_rms_norm(self._rows[words], x, residual, weight, eps)
