"""Runs files of tests in Triton's interpreter as standard input names them, one a line.

Each is answered by a line of JSON on standard output: pytest's exit code, and what it said.
"""

import io
import json
import os
import sys
from contextlib import redirect_stdout

import pytest


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a test prints is no answer
    for line in sys.stdin:
        said = io.StringIO()
        with redirect_stdout(said):
            code = pytest.main(["-p", "no:cacheprovider", "-x", line.rstrip("\n")])
        answers.write(json.dumps([code, said.getvalue()]) + "\n")


if __name__ == "__main__":  # processes that a test spawns read this file again
    main()
