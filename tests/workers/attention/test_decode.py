"""The decode kernel against the plain implementation: on a GPU where there is one, else in Triton's interpreter."""

from typing import Any

import pytest
import torch

from support.interpreter import DEVICE, INTERPRETED, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.workers.attention import decode as ours
    from eagleray.workers.attention.decode import LaunchConstants, allocate_workspace
    from support.decode_batch import COARSE, FINE, LENGTHS, SPECS, DecodeBatch, check, spec

    @pytest.fixture(autouse=True)
    def short_sections(monkeypatch: pytest.MonkeyPatch) -> None:
        """So that contexts need not be long to have several."""
        monkeypatch.setattr(ours, "SECTION", 256)

    def decodes(*args: Any, **options: Any) -> DecodeBatch:
        return DecodeBatch(*args, device=DEVICE, **options)

    @pytest.mark.parametrize("short_chunks", [False, True])
    @pytest.mark.parametrize("name", SPECS)
    def test_it_computes_attention(name: str, short_chunks: bool) -> None:
        batch = decodes(LENGTHS, SPECS[name])
        check(batch, batch.run(short_chunks=short_chunks))

    @pytest.mark.parametrize("short_chunks", [False, True])
    def test_a_plan_serves_one_layer_after_another(short_chunks: bool) -> None:
        batch = decodes([0, 550, 270, 140, 1], SPECS["plain"])
        first, second = batch.run_layers(2, short_chunks=short_chunks)
        check(batch, first)
        assert torch.equal(first, second)

    @pytest.mark.parametrize("block_size", [16, 32, 128, 256])
    @pytest.mark.parametrize("tile", [16, 32])
    def test_blocks_and_tiles_of_any_size(block_size: int, tile: int) -> None:
        batch = decodes([1, 127, 128, 129, 300], spec(sliding_window=140), block_size)
        check(batch, batch.run(tile=tile))

    @pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.float16, torch.bfloat16])
    def test_short_floats(dtype: torch.dtype) -> None:
        """The interpreter multiplies no bfloat16: it takes the numbers for integers."""
        batch = decodes([5, 100, 300], spec(), dtype=dtype)
        check(batch, batch.run())

    @pytest.mark.parametrize("short_chunks", [False, True])
    @pytest.mark.parametrize("name", ["plain", "soft cap", "window of more than a section"])
    def test_how_the_work_is_shared_changes_no_bit(name: str, short_chunks: bool) -> None:
        batch = decodes([550, 270, 140, 1], SPECS[name])
        longest_alone = 2 * batch.spec.num_kv_heads  # lanes, with which half of all keys are the limit
        fine = batch.run(FINE, short_chunks=short_chunks)
        assert torch.equal(fine, batch.run(COARSE, short_chunks=short_chunks))
        assert torch.equal(fine, batch.run(longest_alone, short_chunks=short_chunks))
        assert torch.equal(fine, batch.run(COARSE, programs_per_sm=1, short_chunks=short_chunks))

    def test_only_a_request_that_is_much_of_the_work_is_cut() -> None:
        batch = decodes([250, 100, 90, 20], spec())
        workspace = allocate_workspace(4, 300, batch.spec, DEVICE, LaunchConstants(lanes=4, worth_cutting=0))
        for lens, ratios in (([250, 100, 90, 20], [8, 1, 1, 1]), ([90, 90, 90, 20], [1, 1, 1, 1]), ([9], [8])):
            ours.plan_decode(workspace, torch.tensor(lens, dtype=torch.int32, device=DEVICE), batch.spec)
            assert workspace.requests[: len(lens), 2].tolist() == ratios

    def test_a_result_does_not_depend_on_the_other_requests() -> None:
        batch = decodes([180, 300, 40], spec())
        alone = decodes([180, 300, 40], spec())
        alone.lens[[0, 2]] = 0
        assert torch.equal(batch.run(COARSE)[1], alone.run(FINE)[1])

    def test_a_context_of_more_than_sixteen_sections(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ours, "SECTION", 128)
        small = spec(num_heads=2, num_kv_heads=1)
        batch = decodes([2049, 2048, 128, 129], small)  # 9 sections of 256, and 16, 1 and 2 of 128
        fine = batch.run(FINE, tile=16)
        check(batch, fine)
        assert torch.equal(fine, batch.run(COARSE, tile=16))

    @pytest.mark.parametrize("short_chunks", [False, True])
    @pytest.mark.parametrize("lanes", [FINE, COARSE])
    def test_sinks_join_the_denominator(lanes: int, short_chunks: bool) -> None:
        """A sink is a key whose score is given and whose value is 0."""
        batch = decodes([3, 0, 100, 300], spec())
        total = torch.full((4, 4), -torch.inf, device=DEVICE)  # log of the sum of exp(scores): [requests, heads]
        for i, seq_len in enumerate([3, 0, 100, 300]):
            keys = batch.cache[0][batch.table[i].long()].flatten(0, 1)[:seq_len].repeat_interleave(2, dim=1)
            scores = torch.einsum("hd,khd->kh", batch.q[i], keys) * batch.spec.scale
            total[i] = scores.logsumexp(0)
        share = torch.sigmoid(total - batch.sinks)  # exp(total) / (exp(total) + exp(sink))
        out = batch.run(lanes, batch.sinks, short_chunks=short_chunks)
        torch.testing.assert_close(out, batch.expected() * share.unsqueeze(-1), atol=2e-5, rtol=2e-5)

    def test_rows_choose_from_a_table_of_all_rows() -> None:
        batch = decodes([40, 300, 0, 17], spec())
        order = torch.tensor([5, 2, 2, 0], device=DEVICE)
        everyone = torch.full((7, batch.table.shape[1]), -1, dtype=torch.int32, device=DEVICE)
        everyone[order[[0, 1, 3]]] = batch.table[[0, 1, 3]]
        workspace = allocate_workspace(8, 512, batch.spec, DEVICE)
        check(batch, batch.run_in(workspace, everyone, order))

    def test_a_workspace_serves_one_batch_after_another() -> None:
        small = spec()
        workspace = allocate_workspace(8, 2048, small, DEVICE)
        for lens in ([2000, 1, 3, 500], [0, 0, 0, 0], [5], [1, 2, 1500]):
            batch = decodes(lens, small)
            out = batch.run_in(workspace, batch.table)
            if any(lens):
                check(batch, out)
            else:
                assert not out.any()

    @pytest.mark.parametrize("lanes", [2, 5, 16])
    def test_no_batch_has_more_pieces_than_the_workspace_holds(lanes: int) -> None:
        """Also where every request is just long enough to be cut, or just begins another section."""
        longest, most = 1500, 0
        for window in (None, 300):
            small = spec(sliding_window=window)
            constants = LaunchConstants(lanes=lanes, worth_cutting=0, tile=16)
            workspace = allocate_workspace(12, longest, small, DEVICE, constants)
            batches = [[length] * n for length in (1, 256, 257, 513, 1281, longest) for n in (1, 2, 5, 12)]
            for lens in [*batches, [longest, *[257] * 11], [*[1] * 6, *[769] * 3]]:
                ours.plan_decode(workspace, torch.tensor(lens, dtype=torch.int32, device=DEVICE), small)
                num_splits = int(workspace.splits[0])
                assert num_splits == int(workspace.requests[: len(lens), 1].sum()) <= len(workspace.work)
                most = max(most, num_splits)
        assert most > 12  # some were cut
