"""A quantised weight that only tests know: a byte for each number, and a scale for each row."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.parallel.weight_shard import Dim, Outputs, WeightShard, stacked_shards

ZERO = 128  # the byte that stands for 0


class RowScaledWeight(nn.Module):
    """`W[row] = scales[row] * (codes[row] - ZERO)`, of the tensors `weight` and `weight_scale`."""

    def __init__(self, outputs: Outputs, inputs: Dim) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        rows = sum(len(each.own) for each in outputs.values())
        codes = torch.empty(rows, len(inputs.own), dtype=torch.uint8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows), requires_grad=False)

    def linear(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        matrix = dequantized(self.codes, self.scales)
        return F.linear(x, matrix, bias) if out is None else torch.mm(x, matrix.t(), out=out)

    def silu_gated(self, x: Tensor) -> Tensor | None:
        return None

    def embed(self, rows: Tensor) -> Tensor:
        return dequantized(self.codes[rows], self.scales[rows])

    def shards(self) -> list[WeightShard]:
        codes = stacked_shards(self.codes, "weight", self.outputs, self.inputs)
        return codes + stacked_shards(self.scales, "weight_scale", self.outputs)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    return scales.unsqueeze(1) * (codes.to(scales.dtype) - ZERO)


def quantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Random codes and scales of the shape of every matrix among `tensors`, of which the others stay."""
    made = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            made[name] = torch.randint(256, tensor.shape, dtype=torch.uint8)
            made[f"{name}_scale"] = torch.rand(len(tensor)) / 100
    return made


def dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in a matrix each."""
    others = {name: tensor for name, tensor in tensors.items() if not name.endswith("_scale")}
    for name in tensors.keys() - others.keys():
        matrix = name.removesuffix("_scale")
        others[matrix] = dequantized(tensors[matrix], tensors[name])
    return others
