"""Kernels that write and clean the KV cache against PyTorch: on a GPU where there is one, else in the interpreter."""

import pytest
import torch

from support.interpreter import DEVICE, RUNS_KERNELS
from support.interpreter_pool import RunFile

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
        run_in_interpreter(__file__)

else:
    from support.kernel_cases import Cases

    CASES = Cases(DEVICE, torch.float32)

    @pytest.mark.parametrize(("num_q", "num_k", "head_size"), [(9, 3, 64), (1, 1, 96), (16, 8, 128), (3, 1, 256)])
    @pytest.mark.parametrize("rotates", [True, False])
    def test_rotation_and_slots(num_q: int, num_k: int, head_size: int, rotates: bool) -> None:
        CASES.rotation_and_slots(num_q, num_k, head_size, rotates)

    @pytest.mark.parametrize(("num_k", "head_size"), [(1, 96), (8, 128)])
    def test_blocks_with_odd_numbers_are_marked_and_cleaned(num_k: int, head_size: int) -> None:
        CASES.marked_and_cleaned_blocks(num_k, head_size)
