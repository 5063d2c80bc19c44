"""What tests that need GPUs say of themselves. Nothing here starts CUDA."""

import pytest
import torch


def needs_gpus(count: int = 1) -> pytest.MarkDecorator:
    """A mark that skips a test where there are fewer CUDA GPUs."""
    have = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = f"needs {count} CUDA GPU{'s' * (count > 1)}, and this machine has {have or 'none'}"
    return pytest.mark.skipif(have < count, reason=reason)
