"""Rows as a batch of decodes in one launch, against the same in PyTorch and against the batch that the host makes."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from eagleray.workers.protocol.messages import RowStart, Sampling, Step
from eagleray.workers.rows import Batch, Rows
from support.interpreter import DEVICE, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from eagleray.workers import row_kernels

    def rows_after_prompts(lengths: list[int], block_size: int, max_len: int) -> Rows:
        """Row `i` has run a prompt of `lengths[i]` random tokens in random blocks, and sampled one more."""
        generator = np.random.default_rng(len(lengths) * max_len + block_size)
        max_blocks = -(-max_len // block_size)
        num_blocks = len(lengths) * max_blocks
        rows = Rows(
            max_rows=len(lengths),
            max_len=max_len,
            block_size=block_size,
            spare_block=num_blocks,
            device=DEVICE,
            on_new_blocks=lambda blocks: None,
        )
        blocks = generator.permutation(num_blocks).reshape(len(lengths), max_blocks)
        starts = [
            RowStart(
                row,
                generator.integers(0, 2**31, length, np.int32).tobytes(),
                length,
                blocks[row, : length // block_size + 1].tolist(),  # with room for the token that follows
                Sampling(),
            )
            for row, length in enumerate(lengths)
        ]
        chunks = rows.apply(Step(1, start=starts, chunks=dict(enumerate(lengths))))
        rows.gather(chunks)
        rows.append(chunks.rows, chunks.ends, torch.arange(len(lengths), device=DEVICE) + 70_000)
        rows.count_sampled(chunks.rows)
        return rows

    def tensors(batch: Batch) -> dict[str, Tensor]:
        named = {field.name: getattr(batch.metadata, field.name) for field in fields(batch.metadata)}
        named |= {"input_ids": batch.input_ids, "positions": batch.positions}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def check(batch: Batch, expected: Batch) -> None:
        ours, theirs = tensors(batch), tensors(expected)
        assert len(ours) == len(theirs) == 6
        for name, tensor in ours.items():
            assert tensor.dtype == theirs[name].dtype, name
            assert torch.equal(tensor, theirs[name]), name

    def plain_gather(
        rows: Tensor, tokens: Tensor, num_computed: Tensor, table: Tensor, block_size: int, _: Tensor | None
    ) -> tuple[Tensor, ...]:
        positions = num_computed[rows]
        slots = table[rows, positions // block_size].long() * block_size + positions % block_size
        starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=rows.device)
        return tokens[rows, positions].long(), positions, slots, (positions + 1).int(), table[rows], starts

    CASES = pytest.mark.parametrize(
        ("block_size", "max_len"),
        [(1, 130), (1, 600), (4, 130), (4, 1024), (4, 1027), (16, 130), (128, 128), (128, 390)],
    )

    def edges(block_size: int, max_len: int) -> list[int]:
        """Lengths around the first two edges of blocks and the end of a row, in no order."""
        around = {edge + d for edge in (block_size, 2 * block_size) for d in (-1, 0, 1)} | {max_len - 2, max_len - 1}
        chosen = [length for length in around if 0 < length < max_len]
        return [chosen[i] for i in np.random.default_rng(7).permutation(len(chosen))]

    @CASES
    def test_a_padded_batch_is_that_of_pytorch(block_size: int, max_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths = edges(block_size, max_len)
        rows = rows_after_prompts(lengths, block_size, max_len)
        chosen = [*range(len(lengths) - 1, -1, -2), *[rows.spare] * 3]  # some rows, and padding
        for lines in (chosen, chosen[:1], [rows.spare]):
            device_rows = torch.tensor(lines, device=DEVICE)
            batch = rows.gather_decodes(device_rows)
            with monkeypatch.context() as patch:
                patch.setattr(row_kernels, "gather_decodes", plain_gather)
                check(batch, rows.gather_decodes(device_rows))
            assert batch.metadata.slot_mapping[-1] == rows.spare_slot or rows.spare not in lines
            lengths_in_place = torch.zeros(len(lines), dtype=torch.int32, device=DEVICE)
            assert rows.gather_decodes(device_rows, lengths_in_place).metadata.seq_lens is lengths_in_place
            assert torch.equal(lengths_in_place, batch.metadata.seq_lens)

    @CASES
    def test_all_rows_give_the_batch_that_the_host_makes(block_size: int, max_len: int) -> None:
        lengths = edges(block_size, max_len)
        rows = rows_after_prompts(lengths, block_size, max_len)
        batch = rows.gather_decodes(torch.arange(len(lengths), device=DEVICE))
        chunks = rows.apply(Step(2))
        assert chunks.is_decode
        expected = rows.gather(chunks)
        width = expected.metadata.block_table.shape[1]  # of the longest
        used = replace(batch.metadata, block_table=batch.metadata.block_table[:, :width])
        check(replace(batch, metadata=used), expected)
