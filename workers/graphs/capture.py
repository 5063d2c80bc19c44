"""Captures a function as a CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], Tensor]  # what the function returns for what its static tensors hold; the next one overwrites it


def capture(forward: Callable[[], Tensor], pool: Any) -> Replay:
    """Replays of `forward`, whose memory is in `pool`. It asks nothing of the host, and its inputs stay in place."""
    forward()  # what is set up on first use must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        result = forward()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
