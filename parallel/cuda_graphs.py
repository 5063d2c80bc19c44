"""CUDA graphs: the launches of a function, recorded once and then replayed without Python."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Replay = Callable[[], Tensor]  # what the function returns for what its static tensors hold; the next one overwrites it


class CudaGraphs:
    """Captures functions on the current CUDA device."""

    def pool(self) -> Any:
        """Memory that graphs may share of which only one runs at a time."""
        return torch.cuda.graph_pool_handle()

    def capture(self, forward: Callable[[], Tensor], pool: Any) -> Replay:
        """Replays of `forward`, whose memory is in `pool`.

        It asks nothing of the host, and its inputs stay in place.
        """
        forward()  # what is set up on first use must not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            result = forward()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def free_bytes(self, device: torch.device) -> int:
        """Memory that no graph has: all that is free once work has ended and torch has kept nothing for later."""
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
