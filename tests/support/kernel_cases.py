"""What the fused kernels must compute, as the layers in PyTorch do, for any sizes, precision and device.

Importing this imports the kernels, so Triton decides by then whether to interpret them.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.models import kernels
from eagleray.models.attention import AttentionSpec
from eagleray.models.layers import rotate
from eagleray.parallel import skinny
from eagleray.workers.attention import kv_kernels
from eagleray.workers.attention.context import AttentionMetadata, LayerCache, PagedKVLayer
from eagleray.workers.attention.reference import ReferenceBackend

# Against float32: of its own rounding, or of results, and of one product's factor, that are rounded to 8 bits.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
SUM_ATOL = {torch.float32: 1e-5, torch.bfloat16: 2**-6}  # products come to about 1, at most 5, with 8 bits


def layer_of(kv: Tensor, marks: Tensor, slots: Tensor) -> PagedKVLayer:
    """A layer with this cache, `[2, num_blocks, block_size, kv_heads, head_size]`, for a batch to be written only."""
    spec = AttentionSpec(num_heads=kv.shape[3], num_kv_heads=kv.shape[3], head_size=kv.shape[4], scale=1.0)
    metadata = AttentionMetadata(
        query_start_loc=torch.empty(0), seq_lens=torch.empty(0), slot_mapping=slots, block_table=torch.empty(0),
        max_query_len=len(slots), max_seq_len=len(slots),
    )  # fmt: skip
    return PagedKVLayer(metadata, LayerCache(kv, marks), spec, ReferenceBackend())


class Cases:
    """The cases on one device, in one precision."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype

    def _compare(self, got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got.float(), expected, atol=1e-5, rtol=RTOL[self._dtype])

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(self._device, self._dtype)

    def add_and_norm(self, rows: int, size: int, with_residual: bool) -> None:
        x, weight = self.random(rows, size), self.random(size, seed=1)
        residual = self.random(rows, size, seed=2) if with_residual else None
        total = x if residual is None else x + residual
        normed, kept = kernels.add_rms_norm(x, residual, weight, 1e-5)
        torch.testing.assert_close(kept, total)
        expected = F.rms_norm(total.float(), (size,), weight.float(), 1e-5)
        self._compare(normed, expected)

    def silu_and_multiply(self, rows: int, size: int) -> None:
        gate_up = self.random(rows, 2 * size)
        gate, up = gate_up.float().chunk(2, dim=-1)
        self._compare(kernels.silu_mul(gate_up), F.silu(gate) * up)

    def skinny_linear(self, rows: int, columns: int, depth: int, with_bias: bool) -> None:
        x, weight = self.random(rows, 2 * depth)[:, :depth], self.random(columns, depth, seed=1) / depth**0.5
        bias = self.random(columns, seed=2) if with_bias else None
        expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        torch.testing.assert_close(skinny.linear(x, weight, bias).float(), expected, atol=SUM_ATOL[self._dtype], rtol=0)

    def skinny_silu_gated(self, rows: int, columns: int, depth: int) -> None:
        x, weight = self.random(rows, depth), self.random(2 * columns, depth, seed=1) / depth**0.5
        gate, up = F.linear(x.float(), weight.float()).chunk(2, dim=-1)
        got = skinny.silu_gated(x, weight).float()
        torch.testing.assert_close(got, F.silu(gate) * up, atol=2 * SUM_ATOL[self._dtype], rtol=2**-6)

    def rotation_and_slots(self, num_q: int, num_k: int, head_size: int, rotates: bool) -> None:
        """Of seven tokens, the last of which is padding; rows stand further apart than they are long."""
        merged = self.random(7, num_q + 2 * num_k, head_size)
        q, k, v = merged.split([num_q, num_k, num_k], dim=1)
        angles = self.random(7, 1, head_size, seed=1).float(), self.random(7, 1, head_size, seed=2).float()
        rotation = angles if rotates else None
        ours = self.random(2, 4, 8, num_k, head_size, seed=3)
        expected, before = ours.float(), merged.clone()
        slots = torch.tensor([31, 0, 7, 8, 20, 9], device=self._device)
        marks = torch.zeros(4, dtype=torch.int8, device=self._device)
        queries, keys = (rotate(x.float(), angles) if rotates else x.float() for x in (q, k))
        for cache, new in zip(expected.flatten(1, 2), (keys, v.float()), strict=True):
            cache[slots] = new[:6]
        self._compare(kv_kernels.rotate_and_write(q, k, v, rotation, layer_of(ours, marks, slots)), queries)
        assert not marks.any()
        self._compare(ours, expected)
        assert torch.equal(merged, before)

    def marked_and_cleaned_blocks(self, num_k: int, head_size: int) -> None:
        """One number of one token is enough, and of two layers each cleans what it has marked."""
        merged = self.random(6, 3 * num_k, head_size)
        slots, blocks = torch.tensor([31, 0, 7, 8, 20, 9]), torch.tensor([3, 0, 0, 1, 2, 1])  # of eight slots
        layers = [self.random(2, 4, 8, num_k, head_size, seed=seed) for seed in (1, 2)]
        for token, (column, value) in enumerate([(-1, torch.nan), (-1, -torch.inf), (num_k, torch.inf)] * 2):
            odd = merged.clone()
            odd[token, column, head_size - 1 - token] = value
            q, k, v = odd.split([num_k, num_k, num_k], dim=1)
            marks = torch.zeros(2, 4, dtype=torch.int8, device=self._device)
            ours = [layer.clone() for layer in layers]
            kv_kernels.rotate_and_write(q, k, v, None, layer_of(ours[1], marks[1], slots.to(self._device)))
            assert marks[1].nonzero().flatten().tolist() == [int(blocks[token])]
            assert not marks[0].any()
            written = ours[1].clone()
            addresses = torch.tensor([layer.data_ptr() for layer in ours], device=self._device)
            sides = torch.tensor([layer[0].nbytes for layer in ours], device=self._device)
            others = torch.tensor([b for b in range(4) if b != blocks[token]], dtype=torch.int32, device=self._device)
            kv_kernels.clean_blocks(others, marks, addresses, sides)
            torch.testing.assert_close(ours, [layers[0], written], rtol=0, atol=0, equal_nan=True)
            kv_kernels.clean_blocks(torch.arange(4, device=self._device), marks, addresses, sides)
            written[:, blocks[token]] = 0
            torch.testing.assert_close(ours, [layers[0], written], rtol=0, atol=0)
            assert not marks.any()
