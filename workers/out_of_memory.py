"""Explains out-of-memory errors: what was being done, how much was asked for, who holds the rest, what to change."""

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from eagleray.parallel.platform import platform_of

GIB = 1 << 30
_SIGNS = ("out of memory", "can't allocate memory", "ALLOC_FAILED")  # CUDA's, torch's on CPU, cuBLAS's
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; only torch's own allocator on CUDA has a class for it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def explained(doing: str, remedy: str, device: torch.device) -> Iterator[None]:
    """Turn running out of memory while `doing` something into a `MemoryError` that ends with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(explain(error, doing, remedy, device)) from error


def explain(error: BaseException, doing: str, remedy: str, device: torch.device) -> str:
    asked = _ASKED.search(str(error))
    wanted = f" ({asked[1]} more were asked for)" if asked else ""
    return f"{device} has no memory left for {doing}{wanted}: {describe_use(device)}; {remedy}"


def describe_use(device: torch.device) -> str:
    """Who holds the device's memory."""
    accelerator = platform_of(device).accelerator
    if accelerator is None:
        return "the machine's memory is in use"
    free, total = accelerator.mem_get_info(device)
    own = accelerator.memory_reserved(device)
    others = max(0, total - free - own)
    return (
        f"of {total / GIB:.1f} GiB, {free / GIB:.1f} are free, this rank's tensors take {own / GIB:.1f}, and "
        f"{others / GIB:.1f} are held by libraries and other processes"
    )


def release_unused(device: torch.device) -> None:
    """Give back what tensors no longer need. A caught error holds tensors, too: leave its `except` first."""
    gc.collect()
    if (accelerator := platform_of(device).accelerator) is not None:
        accelerator.empty_cache()
