"""Every launch of a kernel says what it wants, since Triton's own defaults change from version to version."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(file for room in ("parallel", "models", "workers") for file in (ROOT / room).rglob("*.py"))


def launches(source: str) -> dict[int, bool]:
    """The lines where a kernel is launched, `kernel[grid](...)`, and whether `**LAUNCH` is among its arguments.

    Or `**EXACT`, which has all of that.
    """
    return {
        call.lineno: any(word.arg is None and ast.unparse(word.value) in ("LAUNCH", "EXACT") for word in call.keywords)
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Subscript)
        and ast.unparse(call.func.value).endswith("kernel")
    }


def test_launches_are_found() -> None:
    assert launches("x_kernel[(1,)](a, **LAUNCH)\nx_kernel[(1,)](a)\nlist[int](a)") == {1: True, 2: False}
    assert sum(len(launches(file.read_text())) for file in FILES) > 10


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_launch_says_how_its_sums_are_rounded(file: Path) -> None:
    assert all(launches(file.read_text()).values())
