"""Where tests of Triton kernels run: on a GPU if there is one, else in Triton's interpreter.

Triton decides once, as a kernel is defined, whether to interpret it. So without a GPU a file of such tests runs in
another process, which is one for all such files. It is started by the only test of the file that is seen from outside:

    if not RUNS_KERNELS:
        def test_in_the_interpreter(run_in_interpreter: RunFile) -> None:
            run_in_interpreter(__file__)
    else:
        ...
"""

import os
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_KERNELS = INTERPRETED or ON_GPU
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


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
