"""The fused kernels against the layers in PyTorch: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch

from support.interpreter import DEVICE, RUNS_KERNELS, run_in_interpreter

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not RUNS_KERNELS:

    def test_in_the_interpreter() -> None:
        run_in_interpreter(__file__)

else:
    from support.kernel_cases import Cases

    CASES = Cases(DEVICE, torch.float32)

    @pytest.mark.parametrize("size", [64, 96, 576, 5000])
    @pytest.mark.parametrize("with_residual", [True, False])
    def test_add_and_norm(size: int, with_residual: bool) -> None:
        CASES.add_and_norm(5, size, with_residual)

    @pytest.mark.parametrize("size", [48, 1024, 1500])
    def test_silu_and_multiply(size: int) -> None:
        CASES.silu_and_multiply(3, size)

    @pytest.mark.parametrize(("num_q", "num_k", "head_size"), [(9, 3, 64), (1, 1, 96), (16, 8, 128), (3, 1, 256)])
    @pytest.mark.parametrize("rotates", [True, False])
    def test_rotation_and_slots(num_q: int, num_k: int, head_size: int, rotates: bool) -> None:
        CASES.rotation_and_slots(num_q, num_k, head_size, rotates)

    @pytest.mark.parametrize(("num_k", "head_size"), [(1, 96), (8, 128)])
    def test_blocks_with_odd_numbers_are_marked_and_cleaned(num_k: int, head_size: int) -> None:
        CASES.marked_and_cleaned_blocks(num_k, head_size)
