"""Whether Triton's kernels can run here: on CUDA, or anywhere in its interpreter."""

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAN_IMPORT = torch.cuda.is_available() or INTERPRETED


def runs_triton(device: torch.device) -> bool:
    """Whether kernels take tensors of `device`."""
    return device.type == "cuda" or INTERPRETED
