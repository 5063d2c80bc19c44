"""What the platform offers kernels, here and as if there were a GPU, and that nothing else needs Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from eagleray.parallel import platform

ROOT = Path(__file__).parents[2]
ROOMS = ("parallel", "models", "workers")
FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def run(script: str, **environment: str) -> list[str]:
    """The words that a new Python without a GPU prints."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "0"}
    environment = os.environ | hidden | environment
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("interpreted", [False, True])
def test_kernels_run_on_cuda_and_anywhere_in_the_interpreter(interpreted: bool) -> None:
    script = "import torch; from eagleray.parallel.platform import HAS_TRITON, runs_triton\n"
    script += "print(HAS_TRITON, runs_triton(torch.device('cpu')), runs_triton(torch.device('cuda')))"
    words = run(script, TRITON_INTERPRET="1" if interpreted else "0")
    assert words == [str(interpreted), str(interpreted), "True"]


def test_a_rank_without_cuda_needs_no_triton() -> None:
    """As if it were not installed."""
    script = "import sys; sys.modules['triton'] = None\nimport eagleray.workers.worker; print('imported')"
    assert run(script) == ["imported"]


def conditional_imports(source: str) -> list[str]:
    """The conditions on which modules of this package are imported at the top of a file."""
    return [
        ast.unparse(statement.test)
        for statement in ast.parse(source).body
        if isinstance(statement, ast.If)
        and any(isinstance(x, ast.ImportFrom) and (x.module or "").startswith("eagleray.") for x in statement.body)
    ]


def test_conditional_imports_are_found() -> None:
    assert conditional_imports("if torch.cuda.is_available():\n    from eagleray.models import kernels") == [
        "torch.cuda.is_available()"
    ]
    assert sum(len(conditional_imports(file.read_text())) for file in FILES) > 5


def test_kernels_are_imported_on_one_condition() -> None:
    conditions = {(condition, file.name) for file in FILES for condition in conditional_imports(file.read_text())}
    assert not [found for found in conditions if found[0] not in ("HAS_TRITON", "TYPE_CHECKING")]


def test_shared_memory_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ada = SimpleNamespace(shared_memory_per_multiprocessor=100 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: ada)
    assert platform.shared_memory(CUDA) == 100 << 10
    assert platform.shared_memory(CPU) == platform.HOPPER, "what runs on CPU stands in for Hopper"


@pytest.mark.parametrize(("rows", "columns", "gated"), [(64, 4096, False), (64, 28672, False), (64, 14336, True)])
def test_products_of_few_rows_fit_what_hopper_has(rows: int, columns: int, gated: bool) -> None:
    """On what `takes` wants; wider tiles for wider weights."""
    pytest.importorskip("triton", reason="Triton has no wheel for this platform")
    from eagleray.parallel import skinny
    from support.compiled_kernel import RESERVED, compiled_bytes

    tile = skinny.tile_of(rows, columns, gated=gated)
    constants = {
        "ROWS": rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "SPLITS": 1, "HAS_BIAS": False, "GATED": gated,
        "PDL": True, "bias": None,
    }  # fmt: skip
    needed = compiled_bytes(skinny._linear_kernel, 90, constants, num_warps=4, num_stages=tile.num_stages)
    assert 0 < needed <= platform.HOPPER - RESERVED
