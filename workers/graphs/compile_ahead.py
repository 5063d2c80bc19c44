"""Compiles Triton kernels in parallel before their first launch."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch.overrides import TorchFunctionMode

from eagleray.parallel.platform import platform_of

MAX_THREADS = 16
_UNSET = {torch.empty, torch.empty_like, torch.empty_strided, torch.Tensor.new_empty}
_Kernels = dict[tuple[str, str], Any]  # by module and name: one of this package


def compile_ahead(runs: Iterable[Callable[[], object]], device: torch.device) -> int:
    """Compile and load the kernels of this package that `runs` would compile; how many those are.

    Each is run once, on `device`, which is the current one, without launching such a kernel: what it returns means
    nothing.
    """
    accelerator = platform_of(device).accelerator
    assert accelerator is not None, "kernels are compiled for no host"
    index = accelerator.current_device()
    kernels: _Kernels = {
        (name, value.__name__): value
        for name, module in list(sys.modules.items())
        if name.startswith("eagleray.")
        for value in vars(module).values()
        if isinstance(value, triton.JITFunction) and value.__module__ == name
    }
    with _launching_nothing(kernels, index) as wanted, _ZeroWhatIsUnset():
        for run in runs:
            run()
    num_threads = min(MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(num_threads, initializer=accelerator.set_device, initargs=(index,)) as pool:
        with triton.AsyncCompileMode(pool):
            compiled = [kernel.preload(specialization) for kernel, specialization in wanted]
        list(pool.map(_load, compiled))
    return len(compiled)


@contextmanager
def _launching_nothing(kernels: _Kernels, device: int) -> Iterator[list[tuple[Any, str]]]:
    """Launches of `kernels` do nothing; the list fills with those that would be compiled, and how specialised."""
    caches = {place: kernel.device_caches[device][0] for place, kernel in kernels.items()}
    known = {place: dict(cache) for place, cache in caches.items()}
    wanted: list[tuple[Any, str]] = []

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        place = fn.module, fn.name
        if place not in kernels:
            return False  # of some other package: compile and launch it
        wanted.append((kernels[place], compile["specialization_data"]))
        caches[place][key] = _NotLaunched
        return True  # neither compile nor launch

    for cache in caches.values():
        cache.update(dict.fromkeys(cache, _NotLaunched))
    hook, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, note
    try:
        yield wanted
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        for place, cache in caches.items():
            cache.clear()
            cache.update(known[place])


class _NotLaunched:
    """Stands where Triton keeps a compiled kernel."""

    function = packed_metadata = None

    @staticmethod
    def launch_metadata(*_: Any) -> None:
        """Asked for before each launch."""

    @staticmethod
    def run(*_: Any) -> None:
        """Instead of a launch."""


class _ZeroWhatIsUnset(TorchFunctionMode):
    """What a kernel that is not launched would have written is zero: torch may take it for an index into a table."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in _UNSET else out


def _load(kernel: Any) -> None:
    """Make the kernel's launcher, for which Triton runs a C compiler, and bring it to the device."""
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    _ = kernel.run
