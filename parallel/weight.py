"""The matrix of a linear layer, of the embedding or of the head: how it is kept, applied, and found in a checkpoint.

Layers decide which part of it a rank has, and leave the rest to their `Weight`. A weight that is kept in another form,
such as numbers of eight bits with scales, takes the dense one's place by implementing the same methods: its scales are
further shards of the same layer. Which weight a model's layers get is decided in `models/weights.py`.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.platform import HAS_TRITON
from eagleray.parallel.weight_shard import Dim, Outputs, WeightShard, parameter, stacked_shards

if HAS_TRITON:
    from eagleray.parallel import skinny


class Weight(Protocol):
    """This rank's part of a matrix W `[out, in]`. A module, so that its tensors are among the model's parameters."""

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """`x W^T + b`, `[..., in]` to `[..., out]`; in `out` if given, where `x` is `[n, in]` and there is no bias."""
        ...

    def silu_gated(self, x: Tensor) -> Tensor | None:
        """`silu(x G^T) * x U^T` where W is G above U, `[n, in]` to `[n, out / 2]`.

        `None` where no kernel does this in one launch: then the caller takes `linear` and a kernel of its own.
        """
        ...

    def embed(self, rows: Tensor) -> Tensor:
        """Those rows of W: `[n]` int64 to `[n, in]`."""
        ...

    def shards(self) -> list[WeightShard]:
        """All that it is made of, by the names that checkpoints have for it."""
        ...


WeightFactory = Callable[[Outputs, Dim], Weight]  # of an uninitialised weight with these outputs and inputs


class DenseWeight(nn.Module):
    """The matrix itself, in the default dtype."""

    def __init__(self, outputs: Outputs, inputs: Dim) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        self.matrix = parameter(sum(len(rows.own) for rows in outputs.values()), len(inputs.own))
        self._has_kernel = HAS_TRITON and skinny.is_fast_on(self.matrix.device)

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        matrix = self.matrix
        if self._has_kernel and skinny.takes(x, matrix):
            return skinny.linear(x, matrix, bias, out)
        if out is not None:
            return torch.mm(x, matrix.t(), out=out)
        return F.linear(x, matrix, bias)

    def silu_gated(self, x: Tensor) -> Tensor | None:
        matrix = self.matrix
        return skinny.silu_gated(x, matrix) if self._has_kernel and skinny.takes(x, matrix, gated=True) else None

    def embed(self, rows: Tensor) -> Tensor:
        return F.embedding(rows, self.matrix)

    def shards(self) -> list[WeightShard]:
        return stacked_shards(self.matrix, "weight", self.outputs, self.inputs)
