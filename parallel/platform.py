"""What the platform offers kernels: Triton, shared memory, and launches that overlap with the kernel before.

Triton comes with torch for CUDA, and with no other. So modules of kernels are imported under `if HAS_TRITON:`, and
called with tensors of devices of which `runs_triton` says yes.

Programmatic dependent launch (CUDA Programming Guide) starts a kernel while the one before it still runs. A kernel that
is launched so does two things first. It lets the next one start, which then waits in turn; and it waits until the one
before has ended and its results can be read. Only what no kernel writes, weights, may be touched earlier. Every kernel
waits, even if it reads nothing of the one before: else the next could overtake both.
"""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run in its interpreter, on any device
HAS_TRITON = torch.cuda.is_available() or INTERPRETED  # whether modules of kernels can be imported

HOPPER = 228 << 10  # bytes per multiprocessor, as with Blackwell's for data centres; A100: 164, others: 100

OVERLAP = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
LAUNCH = {
    "launch_pdl": OVERLAP,
    "enable_fp_fusion": True,  # Triton's default until 3.9, which 3.10 turns round: a * b + c rounded once
}  # what every launch of a kernel says


def runs_triton(device: torch.device) -> bool:
    """Whether kernels take tensors of `device`."""
    return device.type == "cuda" or INTERPRETED


def shared_memory(device: torch.device) -> int:
    """Bytes per multiprocessor, for a kernel's tiles; off CUDA, Hopper's, since what runs there stands in for it."""
    if device.type != "cuda":
        return HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
