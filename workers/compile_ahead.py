"""Triton's kernels compiled side by side before their first launch, which would compile them one after the other."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

MAX_THREADS = 16
_Key = tuple[int, str]  # of a function, and of one way to specialise it
_aten = torch.ops.aten
_UNSET = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}


def compile_ahead(runs: Iterable[Callable[[], object]]) -> int:
    """Compile the kernels of this package that `runs` would launch and that are not compiled yet; how many those are.

    Each is run once, on the current CUDA device, without launching one of them. So what it returns means nothing.
    """
    wanted: dict[_Key, tuple[Any, str]] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        wanted[id(fn.jit_function), key] = fn.jit_function, compile["specialization_data"]
        return True  # neither compile nor launch

    with _forgotten(torch.cuda.current_device()) as known, _hook(note), _ZeroWhatIsUnset():  # type: ignore[no-untyped-call]
        for run in runs:
            run()
    new = [value for key, value in wanted.items() if key not in known]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool, triton.AsyncCompileMode(pool):
        for function, specialization in new:
            function.preload(specialization)
    return len(new)


@contextmanager
def _forgotten(device: int) -> Iterator[set[_Key]]:
    """No kernel of this package counts as compiled meanwhile: a few alone, without what others prepare, would fail."""
    modules = [module for name, module in sys.modules.items() if name.startswith("eagleray.")]
    values = (value for module in modules for value in vars(module).values())
    functions = {id(value): value for value in values if isinstance(value, triton.JITFunction)}
    caches = {name: function.device_caches[device][0] for name, function in functions.items()}
    compiled = {name: dict(cache) for name, cache in caches.items()}
    for cache in caches.values():
        cache.clear()
    try:
        yield {(name, key) for name, kernels in compiled.items() for key in kernels}
    finally:
        for name, kernels in compiled.items():
            caches[name].update(kernels)


@contextmanager
def _hook(note: Callable[..., bool]) -> Iterator[None]:
    """Ask `note` instead of compiling."""
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = note
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


class _ZeroWhatIsUnset(TorchDispatchMode):
    """What a kernel that is not launched would have written is zero: torch may take it for an index into a table."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.zero_() if func in _UNSET else out
