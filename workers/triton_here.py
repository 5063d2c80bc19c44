"""Whether Triton's kernels run here: on CUDA, for which Triton comes with torch, and anywhere in its interpreter."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAN_IMPORT = torch.cuda.is_available() or INTERPRETED


def runs_triton(device: torch.device) -> bool:
    """Whether kernels take tensors of `device`."""
    return device.type == "cuda" or INTERPRETED
