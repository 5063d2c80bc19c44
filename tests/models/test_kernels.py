"""The fused kernels against the layers in PyTorch: on a GPU where there is one, else in Triton's interpreter.

Triton decides once, as a kernel is defined, whether to interpret it: so without a GPU these tests run in a process of
their own, which the only test seen from outside starts.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

if not (INTERPRETED or ON_GPU):

    def test_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(Path(__file__))]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        root = Path(__file__).parents[2]
        done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
        assert " passed" in done.stdout

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
