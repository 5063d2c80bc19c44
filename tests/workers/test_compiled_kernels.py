"""Every kernel compiles for a GPU as it is launched, here where there may be none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

ROOT = Path(__file__).parents[2]


def test_every_kernel_compiles_as_it_is_launched() -> None:
    """The interpreter takes what the compiler does not, such as a number that changes its type in a loop."""
    sources = [path.read_text() for room in ("models", "parallel", "workers") for path in (ROOT / room).rglob("*.py")]
    kernels = {name for text in sources for name in re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE)}
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = [sys.executable, str(ROOT / "tests/support/compile_for_gpu.py")]
    run = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert set(run.stdout.split()) == kernels
