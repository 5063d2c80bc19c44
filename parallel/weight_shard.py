"""How a layer says which tensors of a checkpoint it is made of, and which region of each belongs to this rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class TensorSlice(Protocol):
    """A tensor in a safetensors file, of which nothing is read before it is indexed."""

    def get_shape(self) -> list[int]: ...

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor: ...


class Dim(NamedTuple):
    """One dimension of a whole tensor: how long it is, and which of it is this rank's."""

    size: int
    own: range

    @classmethod
    def whole(cls, size: int) -> "Dim":
        """One of which every rank has all."""
        return cls(size, range(size))


Outputs = Mapping[str | None, Dim]  # of a layer (`None`), or of several, by name, that are merged into one


@dataclass(frozen=True, kw_only=True)
class WeightShard:
    """One tensor of a checkpoint: `region` of it is this rank's and goes to `target`, a view of a parameter.

    The tensor is called `name` inside the layer's own path, or, where a layer merges several (gate and up, or q, k and
    v), inside the path of its sibling `part`, or, where `part` is empty, beside the layer.
    """

    name: str  # such as "weight" or "bias"
    shape: tuple[int, ...]  # of the whole tensor
    region: tuple[slice, ...]  # one slice with start and stop per dimension
    target: Tensor
    part: str | None = None
    mean: float = 0.0  # of random weights

    def path(self, layer: str) -> str:
        """The tensor's name in the checkpoint, for a layer that stands at `layer` in the model."""
        if self.part is None:
            return f"{layer}.{self.name}"
        parent, _, _ = layer.rpartition(".")
        return ".".join(filter(None, (parent, self.part, self.name)))

    def load(self, source: TensorSlice) -> None:
        """Read this rank's region, and nothing else. Raises `ValueError` for another shape, or a wrong dtype."""
        self.check_shape(source)
        values = source[self.region]
        self.check_dtype(values.dtype)
        self.target.copy_(values)

    def check_shape(self, source: TensorSlice) -> None:
        """Raise `ValueError` when the tensor in the file is not of the shape that the model needs."""
        if tuple(source.get_shape()) != self.shape:
            raise ValueError(f"has shape {source.get_shape()}, but the model needs {list(self.shape)}")

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Raise `ValueError` unless `dtype` is the target's, or both are of floating-point numbers."""
        wanted = self.target.dtype
        if dtype == wanted or (dtype.is_floating_point and wanted.is_floating_point):
            return
        if wanted.is_floating_point:
            raise ValueError(f"has dtype {dtype}, but weights are floating-point numbers, not quantized")
        raise ValueError(f"has dtype {dtype}, but the model needs {wanted}")


@runtime_checkable
class HasWeightShards(Protocol):
    """A layer with weights."""

    def weight_shards(self) -> list[WeightShard]: ...


def parameter(*shape: int) -> nn.Parameter:
    """Uninitialised weights of the default dtype on the default device, for inference only."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


def region(*ranges: range) -> tuple[slice, ...]:
    """The slices that cut these ranges out of a tensor, one per dimension."""
    return tuple(slice(own.start, own.stop) for own in ranges)


def stacked_shards(tensor: Tensor, name: str, outputs: Outputs, *others: Dim) -> list[WeightShard]:
    """A shard for each layer whose rows are in `tensor`, `[outputs, *others]`: that layer's tensor `name`."""
    targets = tensor.detach().split([len(rows.own) for rows in outputs.values()])
    return [
        WeightShard(
            part=part,
            name=name,
            shape=(rows.size, *(dim.size for dim in others)),
            region=region(rows.own, *(dim.own for dim in others)),
            target=target,
        )
        for (part, rows), target in zip(outputs.items(), targets, strict=True)
    ]
