"""All-reduce of small messages between GPUs of one node, over memory that every rank can read (torch symmetric memory).

One-shot: each rank reads everybody's message and adds it up. Two-shot: each rank adds up its part and reads the other
parts. Both are torch's kernels, and use neither NVLink multicast nor threads of their own.
"""

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # that the kernels add up
ONE_SHOT_BYTES = 256 * 1024  # measured on four H200: beyond it two shots are faster
MAX_BYTES = 8 * 1024 * 1024  # and beyond this one, with its copies, NCCL is


class SymmetricMemory:
    """One buffer per rank, used by one all-reduce after the other."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        """A collective call. Raises `RuntimeError` where the GPUs cannot reach each other's memory."""
        self._name = group.group_name
        self._buffer = symm_mem.empty(MAX_BYTES, dtype=torch.uint8, device=device)
        symm_mem.rendezvous(self._buffer, self._name)

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels add up such a message: small, and cut into 16-byte words for each rank."""
        return x.dtype in DTYPES and x.nbytes <= MAX_BYTES and x.nbytes % 256 == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all ranks, bitwise equal on all of them."""
        buffer = self._buffer.view(x.dtype)[: x.numel()].view_as(x)
        if x.nbytes <= ONE_SHOT_BYTES:
            return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x, "sum", self._name)  # type: ignore[no-any-return]
        buffer.copy_(x)
        torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", self._name)
        return buffer.clone()
