"""The fused kernels against the layers in PyTorch: on a GPU where there is one, else in Triton's interpreter."""

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

    @pytest.mark.parametrize("size", [64, 96, 576, 5000])
    @pytest.mark.parametrize("with_residual", [True, False])
    def test_add_and_norm(size: int, with_residual: bool) -> None:
        CASES.add_and_norm(5, size, with_residual)

    @pytest.mark.parametrize("size", [48, 1024, 1500])
    def test_silu_and_multiply(size: int) -> None:
        CASES.silu_and_multiply(3, size)
