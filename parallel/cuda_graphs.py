"""CUDA graphs: the launches of a function, recorded once and then replayed without Python."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Replay = Callable[[], T]  # what the function returns for what its static tensors hold; the next one overwrites it


class CudaGraphs:
    """Captures functions on the current CUDA device."""

    def pool(self) -> Any:
        """Memory that graphs may share of which only one runs at a time."""
        return torch.cuda.graph_pool_handle()

    def capture(self, forward: Callable[[], T], pool: Any) -> Replay[T]:
        """Replays of `forward`, whose memory is in `pool`.

        It asks nothing of the host, and its inputs stay in place.
        """
        forward()  # what is set up on first use must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = forward()
        return _replays(graph, result)

    def capture_between_steps(self, forward: Callable[[], T], pool: Any) -> Replay[T]:
        """As `capture`, of what has run before, while the device is at work: nobody waits for it."""
        graph = torch.cuda.CUDAGraph()
        with _collecting_nothing(), torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                result = forward()
            finally:
                graph.capture_end()
        return _replays(graph, result)

    def free_bytes(self, device: torch.device) -> int:
        """Memory that no graph has: all that is free once work has ended and torch has kept nothing for later."""
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]


def _replays(graph: torch.cuda.CUDAGraph, result: T) -> Replay[T]:
    def replay() -> T:
        graph.replay()
        return result

    return replay


@contextmanager
def _collecting_nothing() -> Iterator[None]:
    """What the collector ends may call what no capture allows."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()
