"""How much shared memory a GPU has for a Triton kernel's tiles and stages."""

import torch

HOPPER = 228 << 10  # bytes per multiprocessor, as with Blackwell's for data centres; A100: 164, others: 100


def shared_memory(device: torch.device) -> int:
    """Bytes per multiprocessor; off CUDA, Hopper's, since what runs there stands in for it."""
    if device.type != "cuda":
        return HOPPER
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
