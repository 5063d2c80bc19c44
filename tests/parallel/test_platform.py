"""What platforms offer, here and as if there were a GPU, and that nothing but kernels needs Triton."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import eagleray.parallel.group
import eagleray.workers.attention.op  # noqa: F401  which define ops, as the one above does
from eagleray.parallel import platform
from eagleray.parallel.device_kind import KINDS, kind_of
from eagleray.parallel.platform import PLATFORMS, Platform, platform_of, processors

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


@pytest.mark.slow
@pytest.mark.parametrize("interpreted", [False, True])
def test_kernels_run_on_cuda_and_anywhere_in_the_interpreter(interpreted: bool) -> None:
    script = "from eagleray.parallel.platform import CUDA, HAS_TRITON, HOST\n"
    script += "print(HAS_TRITON, HOST.runs_kernels, CUDA.runs_kernels, HOST.compiles_kernels, CUDA.compiles_kernels)"
    words = run(script, TRITON_INTERPRET="1" if interpreted else "0")
    assert words == [str(interpreted), str(interpreted), "True", "False", "True"]


def test_every_kind_has_a_platform_and_no_platform_is_of_another() -> None:
    assert [platform_of(torch.device(name)).kind for name in KINDS] == list(KINDS.values())
    assert [each.kind for each in PLATFORMS] == list(KINDS.values())


@pytest.mark.parametrize("each", PLATFORMS, ids=lambda each: each.kind.name)
def test_a_platform_says_the_same_as_its_kind(each: Platform) -> None:
    """What torch is not needed for is said in one place, and follows from the other in the other."""
    assert (each.accelerator is None) == each.kind.on_host
    assert each.graphs is None or each.accelerator is not None, "graphs are an accelerator's"
    assert each.kind.wants_powers_of_two or not each.compiles_kernels


def test_a_device_that_nothing_is_known_of_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"runs on vulkan; choose one of cpu, cuda$"):
        platform_of(torch.device("vulkan"))
    with pytest.raises(ValueError, match=r"'vulkan'; choose one of cpu, cuda$"):
        kind_of("vulkan")


def test_an_outline_is_built_as_on_the_host() -> None:
    assert platform_of(torch.device("meta")) is platform_of(CPU)


@pytest.mark.parametrize("each", PLATFORMS, ids=lambda each: each.kind.name)
def test_every_op_is_there_on_every_platform(each: Platform) -> None:
    """But for the norm that is part of a sum, which only compiled kernels compute."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    key = each.kind.name.upper()
    for op in ("all_reduce", "add_up", "all_gather", "attention"):
        assert has(f"eagleray::{op}", key)
    assert has("eagleray::all_reduce_rms_norm", key) == each.compiles_kernels


@pytest.mark.slow
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


@pytest.mark.parametrize(("major", "is_hopper"), [(8, False), (9, True), (10, False)])
def test_processors_are_the_devices_own(major: int, is_hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(multi_processor_count=142, shared_memory_per_multiprocessor=100 << 10, major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    assert processors(CUDA) == (142, 100 << 10, is_hopper)
    assert processors(CPU).shared_memory == platform.HOPPER, "what runs on CPU stands in for Hopper"
    assert not processors(CPU).run_hopper_code


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
