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
from dataclasses import replace
from functools import cache
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = torch.cuda.is_available() and not INTERPRETED
RUNS_KERNELS = INTERPRETED or ON_GPU
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


def _interpret_faster() -> None:
    """Have the interpreter prepare the functions of a module once per launch, and not at every call of one.

    Without `debug` it also makes asserts that no sum overflows, and drops them; and it looks types up in a table that
    it writes each time. All this is most of its time, and nothing else changes.
    """
    from triton import language
    from triton.runtime import interpreter

    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    of_scalar = cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda kind: of_scalar(language.uint64 if kind.scalar.is_ptr() else kind.scalar)

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
