"""Products with few rows against the plain ones: on a GPU where there is one, else in Triton's interpreter."""

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
    from eagleray.parallel import single_row, skinny
    from support.kernel_cases import Cases

    CASES = Cases(DEVICE, torch.float32 if INTERPRETED else torch.bfloat16)

    @pytest.mark.parametrize("with_bias", [True, False])
    @pytest.mark.parametrize(("columns", "depth"), [(64, 256), (192, 512), (64, 1024), (192, 2048)])
    @pytest.mark.parametrize("rows", [1, 5, 16, 17, 33, 64])
    def test_linear(rows: int, columns: int, depth: int, with_bias: bool) -> None:
        CASES.skinny_linear(rows, columns, depth, with_bias)

    @pytest.mark.parametrize(("columns", "depth"), [(64, 3584), (128, 8192), (192, 4096)])
    def test_single_rows_of_several_tiles(columns: int, depth: int) -> None:
        assert depth > single_row.tile_of(columns, depth, gated=False)[1]
        CASES.skinny_linear(1, columns, depth, with_bias=True)
        CASES.skinny_silu_gated(1, columns, depth)

    @pytest.mark.parametrize("columns", [skinny.WIDE, skinny.WIDE + 64])
    @pytest.mark.parametrize("rows", [16, 17, 40])
    def test_wide(rows: int, columns: int) -> None:
        CASES.skinny_linear(rows, columns, 256, with_bias=True)

    @pytest.mark.parametrize(("columns", "depth"), [(64, 256), (192, 512), (192, 2048)])
    @pytest.mark.parametrize("rows", [1, 16, 17, 64])
    def test_silu_gated(rows: int, columns: int, depth: int) -> None:
        CASES.skinny_silu_gated(rows, columns, depth)
