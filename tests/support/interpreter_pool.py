"""A process that runs files of tests in Triton's interpreter, and stays, since importing torch takes it seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

RunFile = Callable[[str], None]


@contextmanager
def interpreter() -> Iterator[RunFile]:
    """Runs the tests in a file; all must pass, and there must be some."""
    command = [
        sys.executable,
        "-m",
        "tests.support.interpreter_process",
    ]  # with the root in `sys.path`, as pytest has it
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root, pipe = Path(__file__).parents[2], subprocess.PIPE
    with subprocess.Popen(command, env=environment, cwd=root, stdin=pipe, stdout=pipe, text=True) as process:

        def run(file: str) -> None:
            assert process.stdin is not None
            assert process.stdout is not None
            print(file, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, "the interpreter's process has ended"
            code, said = json.loads(answer)
            assert code == 0, said[-8000:]
            assert " passed" in said

        try:
            yield run
        except BaseException:  # a test that takes too long is still running there
            process.kill()
            raise
