"""Where tests of Triton kernels run: on a GPU if there is one, else in Triton's interpreter.

Triton decides once, as a kernel is defined, whether to interpret it. So without a GPU a file of such tests runs in a
process of its own, started by the only one of its tests that is seen from outside:

    if not RUNS_KERNELS:
        def test_in_the_interpreter() -> None:
            run_in_interpreter(__file__)
    else:
        ...
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_KERNELS = INTERPRETED or ON_GPU
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def run_in_interpreter(file: str) -> None:
    """Run the tests in `file`; all must pass, and there must be some."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", file]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def _interpret_faster() -> None:
    """Have the interpreter prepare the functions of a module once per launch, and not at every call of one.

    That halves the time of kernels that are made of many small functions. Nothing else changes.
    """
    from triton.runtime import interpreter

    prepared: set[str] = set()
    launch = interpreter.GridExecutor.__call__

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> None:
        prepared.clear()
        launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn.__module__ not in prepared:
            interpreter._patch_lang(self.fn)
            prepared.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.GridExecutor.__call__ = launch_anew
    interpreter.InterpretedFunction.__call__ = call


if INTERPRETED:
    _interpret_faster()
