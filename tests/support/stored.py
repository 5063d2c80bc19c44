"""Tensors in place of a checkpoint, for a layer that stands alone."""

from torch import Tensor

from eagleray.parallel.weight_shard import HasWeightShards


class Stored:
    """A tensor that is indexed like one in a safetensors file."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def __getitem__(self, region: tuple[slice, ...]) -> Tensor:
        return self.tensor[region]


def load(layer: HasWeightShards, tensors: dict[str, Tensor]) -> None:
    """By the names that shards have beside a layer called `parent.layer`."""
    shards = {shard.path("parent.layer"): shard for shard in layer.weight_shards()}
    assert shards.keys() == tensors.keys()
    for name, shard in shards.items():
        shard.load(Stored(tensors[name]))
