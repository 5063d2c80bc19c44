"""The decode kernel against the plain implementation: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from eagleray.models.attention import AttentionSpec
from eagleray.workers.attention import reference_attention
from eagleray.workers.context import AttentionMetadata
from support.interpreter import DEVICE, INTERPRETED, RUNS_KERNELS, run_in_interpreter

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.workers import decode_attention as ours
    from eagleray.workers.decode_attention import LaunchConstants, allocate_workspace, decode_attention

    FINE, COARSE = 1 << 20, 0  # for fine_below: always chunks, always sections

    class Batch:
        """Requests with random queries and caches. A row of -1 is padding; what belongs to nobody is huge."""

        def __init__(
            self,
            seq_lens: Sequence[int],
            spec: AttentionSpec,
            block_size: int = 16,
            dtype: torch.dtype = torch.float32,
            seed: int = 0,
        ) -> None:
            generator = torch.Generator().manual_seed(seed)
            n, self.spec = len(seq_lens), spec
            num_blocks = [-(-seq_len // block_size) for seq_len in seq_lens]
            free = torch.randperm(sum(num_blocks) + 5, generator=generator)
            shape = (2, len(free), block_size, spec.num_kv_heads, spec.head_size)
            cache = torch.full(shape, 1e4)
            self.table = torch.zeros(n, max(*num_blocks, 1) + 2, dtype=torch.int32)
            for i, seq_len in enumerate(seq_lens):
                blocks = free[sum(num_blocks[:i]) : sum(num_blocks[: i + 1])]
                self.table[i, : len(blocks)] = blocks
                slots = (blocks[:, None] * block_size + torch.arange(block_size)).flatten()[:seq_len]
                new = torch.randn(2, seq_len, spec.num_kv_heads, spec.head_size, generator=generator)
                cache.flatten(1, 2)[:, slots] = new
            # as a split of a merged projection: not contiguous
            wide = torch.randn(n, 2 * spec.num_heads * spec.head_size, generator=generator)
            q = wide[:, : spec.num_heads * spec.head_size].view(n, spec.num_heads, spec.head_size)
            self.sinks = torch.randn(spec.num_heads, generator=generator).to(DEVICE)
            self.q, self.cache = q.to(DEVICE, dtype), cache.to(DEVICE, dtype)
            self.table, self.lens = self.table.to(DEVICE), torch.tensor(seq_lens, dtype=torch.int32, device=DEVICE)

        def run(self, fine_below: int = FINE, sinks: Tensor | None = None, **constants: Any) -> Tensor:
            launch = LaunchConstants(**{"tile": 64, "fine_below": fine_below, **constants})
            longest = int(self.lens.max())
            workspace = allocate_workspace(len(self.lens), longest, self.spec, DEVICE, launch)
            k, v = self.cache
            return decode_attention(self.q, k, v, self.table, self.lens, self.spec, longest, workspace, sinks=sinks)

        def expected(self) -> Tensor:
            """By the plain implementation, in float32, of the requests that are no padding."""
            live = self.lens > 0
            lens = self.lens[live]
            metadata = AttentionMetadata(
                query_start_loc=torch.arange(len(lens) + 1, dtype=torch.int32, device=DEVICE),
                seq_lens=lens,
                slot_mapping=torch.empty(0, dtype=torch.int64, device=DEVICE),
                block_table=self.table[live],
                max_query_len=1,
                max_seq_len=int(lens.max()),
            )
            out = torch.zeros_like(self.q, dtype=torch.float32)
            k, v = self.cache.float()
            out[live] = reference_attention(self.q[live].float(), k, v, metadata, self.spec)
            return out

    def spec(**changes: Any) -> AttentionSpec:
        return AttentionSpec(**{"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "scale": 0.125, **changes})

    SPECS = {
        "plain": spec(),
        "heads of 96": spec(head_size=96),
        "heads of 128": spec(head_size=128),
        "heads of 256": spec(head_size=256),
        "one query head per KV head": spec(num_heads=3, num_kv_heads=3),
        "seven query heads per KV head": spec(num_heads=7, num_kv_heads=1),
        "twenty query heads per KV head": spec(num_heads=20, num_kv_heads=1),
        "window": spec(sliding_window=100),
        "window of one token": spec(sliding_window=1),
        "window of more than a section": spec(sliding_window=1030),
        "soft cap": spec(logits_soft_cap=1.5),
        "window and soft cap": spec(sliding_window=33, logits_soft_cap=1.5),
    }
    LENGTHS = [1, 0, 15, 16, 17, 255, 256, 0, 257, 1090, 0]
    TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # the weights are rounded to dtype

    def check(batch: Batch, out: Tensor) -> None:
        limit = TOLERANCE[out.dtype]
        torch.testing.assert_close(out.float(), batch.expected(), atol=limit, rtol=limit)
        assert not out[batch.lens == 0].any()

    @pytest.mark.parametrize("name", SPECS)
    def test_it_computes_attention(name: str) -> None:
        batch = Batch(LENGTHS, SPECS[name])
        check(batch, batch.run())

    @pytest.mark.parametrize("block_size", [16, 32, 128, 256])
    @pytest.mark.parametrize("tile", [32, 128])
    def test_blocks_and_tiles_of_any_size(block_size: int, tile: int) -> None:
        batch = Batch([1, 127, 128, 129, 300], spec(sliding_window=140), block_size)
        check(batch, batch.run(tile=tile))

    @pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
    def test_short_floats(dtype: torch.dtype) -> None:
        """The interpreter multiplies no bfloat16: it takes the numbers for integers."""
        batch = Batch([5, 300, 1100], spec(), dtype=dtype)
        check(batch, batch.run())

    @pytest.mark.parametrize("name", ["plain", "soft cap", "window of more than a section"])
    def test_how_the_work_is_shared_changes_no_bit(name: str) -> None:
        batch = Batch([3000, 1500, 700, 1], SPECS[name])
        assert torch.equal(batch.run(FINE), batch.run(COARSE))

    def test_a_result_does_not_depend_on_the_other_requests() -> None:
        batch = Batch([700, 1100, 40], spec())
        alone = Batch([700, 1100, 40], spec())
        alone.lens[[0, 2]] = 0
        assert torch.equal(batch.run(COARSE)[1], alone.run(FINE)[1])

    def test_a_context_of_more_than_sixteen_sections(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ours, "SECTION", 64)
        batch = Batch([1500, 1024, 1025, 64, 65], spec(num_heads=2, num_kv_heads=1))  # 12 sections of 128, 16 of 64
        fine = batch.run(FINE, tile=16)
        check(batch, fine)
        assert torch.equal(fine, batch.run(COARSE, tile=16))

    @pytest.mark.parametrize("fine_below", [FINE, COARSE])
    def test_sinks_join_the_denominator(fine_below: int) -> None:
        """A sink is a key whose score is given and whose value is 0."""
        batch = Batch([3, 0, 100, 1100], spec())
        total = torch.full((4, 4), -torch.inf, device=DEVICE)  # log of the sum of exp(scores): [requests, heads]
        for i, seq_len in enumerate([3, 0, 100, 1100]):
            keys = batch.cache[0][batch.table[i].long()].flatten(0, 1)[:seq_len].repeat_interleave(2, dim=1)
            scores = torch.einsum("hd,khd->kh", batch.q[i], keys) * batch.spec.scale
            total[i] = scores.logsumexp(0)
        share = torch.sigmoid(total - batch.sinks)  # exp(total) / (exp(total) + exp(sink))
        torch.testing.assert_close(
            batch.run(fine_below, batch.sinks), batch.expected() * share.unsqueeze(-1), atol=2e-5, rtol=2e-5
        )

    def test_rows_choose_from_a_table_of_all_rows() -> None:
        batch = Batch([40, 300, 0, 17], spec())
        order = torch.tensor([5, 2, 2, 0], device=DEVICE)
        everyone = torch.full((7, batch.table.shape[1]), -1, dtype=torch.int32, device=DEVICE)
        everyone[order[[0, 1, 3]]] = batch.table[[0, 1, 3]]
        workspace = allocate_workspace(8, 512, batch.spec, DEVICE)
        k, v = batch.cache
        out = decode_attention(batch.q, k, v, everyone, batch.lens, batch.spec, 300, workspace, rows=order)
        check(batch, out)

    def test_a_workspace_serves_one_batch_after_another() -> None:
        small = spec()
        workspace = allocate_workspace(8, 2048, small, DEVICE)
        for lens in ([2000, 1, 3, 500], [0, 0, 0, 0], [5], [1, 2, 1500]):
            batch = Batch(lens, small)
            k, v = batch.cache
            out = decode_attention(batch.q, k, v, batch.table, batch.lens, small, 2048, workspace)
            if any(lens):
                check(batch, out)
            else:
                assert not out.any()

    @pytest.mark.parametrize("sizes", [(3, 700), (40, 5000), (256, 131072)])
    def test_the_workspace_takes_what_it_says(sizes: tuple[int, int]) -> None:
        workspace = allocate_workspace(*sizes, spec(), DEVICE)
        tensors = (getattr(workspace, name) for name in ("header", "starts", "work", "partial", "partial_ml"))
        assert sum(tensor.nbytes for tensor in tensors) == ours.workspace_bytes(*sizes, spec())
