"""The kernel for chunks of any length against the definition: on a GPU where there is one, else in the interpreter."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from support.interpreter import DEVICE, INTERPRETED, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.models.attention import AttentionSpec
    from eagleray.workers.attention.context import PagedKVLayer
    from eagleray.workers.attention.varlen import LaunchConstants, VarlenBackend
    from support.attention_requests import Requests
    from support.decode_batch import SPECS, TOLERANCE, spec

    SMALL = LaunchConstants(rows=16, tile=16, num_warps=4, num_stages=2)  # many blocks and tiles, also in float32
    MIXED = [(1, 40), (17, 17), (1, 1), (1, 33), (12, 23)]  # tokens in this batch, and of the request

    def requests_of(
        lengths: list[tuple[int, int]], of: AttentionSpec, block_size: int = 16, **options: Any
    ) -> Requests:
        return Requests(lengths, of, block_size=block_size, device=DEVICE.type, **options)

    def check(requests: Requests, constants: LaunchConstants = SMALL, sinks: Tensor | None = None) -> None:
        out = requests.run(backend=VarlenBackend(constants), sinks=sinks)
        limit = TOLERANCE[out.dtype]
        torch.testing.assert_close(out.float().cpu(), requests.expected(sinks), atol=limit, rtol=limit)

    @pytest.mark.parametrize("name", SPECS)
    def test_it_computes_attention(name: str) -> None:
        check(requests_of(MIXED, SPECS[name]))

    @pytest.mark.parametrize("window", [1, 15, 16, 17, 33])
    @pytest.mark.parametrize("rows", [16, 64])
    def test_windows_of_any_size(window: int, rows: int) -> None:
        """Fewer and more keys than a program has queries, at and beside the borders of tiles."""
        of = spec(num_heads=1, num_kv_heads=1, sliding_window=window)
        check(requests_of([(50, 70), (1, 33)], of), replace(SMALL, rows=rows))

    @pytest.mark.parametrize("block_size", [4, 16, 64])
    @pytest.mark.parametrize("tile", [16, 32])
    def test_blocks_and_tiles_of_any_size(block_size: int, tile: int) -> None:
        check(requests_of([(20, 70), (1, 65)], spec(sliding_window=40), block_size), replace(SMALL, tile=tile))

    @pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
    def test_short_floats(dtype: torch.dtype) -> None:
        """The interpreter multiplies no bfloat16: it takes the numbers for integers."""
        check(requests_of(MIXED, spec(), dtype=dtype))

    @pytest.mark.parametrize("name", ["plain", "window and soft cap"])
    def test_sinks_join_the_denominator(name: str) -> None:
        check(requests_of(MIXED, SPECS[name]), sinks=torch.tensor([2.0, -1.0, 0.0, 40.0], device=DEVICE))

    def test_more_requests_than_are_looked_at_together() -> None:
        of = spec(num_heads=1, num_kv_heads=1)
        check(requests_of([(int(i % 37 == 0), 1 + i % 3) for i in range(260)] + [(5, 9), (0, 4), (3, 3)], of))

    def test_what_nobody_wrote_is_not_read() -> None:
        requests = requests_of([(20, 20), (1, 33), (3, 70)], spec(sliding_window=40), 64)
        requests.cache[requests.cache > 1e4] = torch.nan
        check(requests)

    def test_padding_gives_zero_and_changes_nothing() -> None:
        requests = requests_of(MIXED, spec())
        backend = VarlenBackend(SMALL)
        out, padded = requests.run(backend=backend), requests.run(padding=25, backend=backend)
        assert torch.equal(padded[:-25], out)
        assert not padded[-25:].any()

    def test_a_batch_padded_for_a_graph() -> None:
        """Tokens before the first request and after the last are not ours, and some requests have no tokens."""
        requests = requests_of([(1, 7)] * 21 + MIXED[1:], spec())
        whole = requests.metadata
        poison = torch.tensor([10**9], dtype=torch.int32, device=DEVICE)  # what lies before must not be read
        lens = torch.cat((poison, whole.seq_lens[21:], torch.zeros_like(whole.seq_lens[:3])))[1:]
        requests.metadata = replace(
            whole,
            query_start_loc=torch.cat((whole.query_start_loc[21:], whole.query_start_loc[-1:].expand(3))),
            seq_lens=lens,
            block_table=torch.cat((whole.block_table[21:], torch.zeros_like(whole.block_table[:3]))),
        )
        out = requests.run(padding=11, backend=VarlenBackend(SMALL)).cpu()
        torch.testing.assert_close(out[21:-11], requests.expected()[21:], atol=2e-5, rtol=2e-5)
        assert not out[-11:].any()

    def test_the_heads_of_a_merged_projection() -> None:
        """As a split of it: not contiguous."""
        requests = requests_of(MIXED, spec())

        class OfMerged(VarlenBackend):
            def __call__(self, q: Tensor, layer: PagedKVLayer) -> Tensor:
                merged = torch.cat((q, torch.full_like(q, torch.nan)), dim=1)
                return super().__call__(merged[:, : q.shape[1]], layer)

        out = requests.run(backend=OfMerged(SMALL)).cpu()
        torch.testing.assert_close(out, requests.expected(), atol=2e-5, rtol=2e-5)

    def test_a_long_chunk_is_the_same_as_its_pieces() -> None:
        whole = requests_of([(60, 75)], spec(sliding_window=30))
        backend = VarlenBackend(SMALL)
        out = whole.run(backend=backend)
        for begin, end in ((0, 1), (1, 24), (24, 60)):
            piece = requests_of([(60, 75)], spec(sliding_window=30))
            piece.cache = whole.cache
            piece.queries, piece.kv = [piece.queries[0][begin:end]], [piece.kv[0][:, : 15 + end]]
            piece.metadata = replace(
                whole.metadata,
                query_start_loc=torch.tensor([0, end - begin], dtype=torch.int32, device=DEVICE),
                seq_lens=whole.metadata.seq_lens - 60 + end,
                slot_mapping=whole.metadata.slot_mapping[begin:end],
            )
            torch.testing.assert_close(piece.run(backend=backend), out[begin:end], atol=1e-6, rtol=1e-6)
