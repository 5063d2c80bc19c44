"""Two readers of one folder: what each makes of it, or says against it, and how often they agree."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAMED_FILE = re.compile(r"[\w.-]+\.(json|safetensors|jinja)")


@dataclass
class Tally:
    """Of cases that went well, how many came out how."""

    counts: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        return f"{self.counts.total()} cases: {parts}; none else"


def compare(
    folder: Path,
    what: str,
    ours: Callable[[Path], dict[str, Any]],
    theirs: Callable[[Path], dict[str, Any]],
    same: Callable[[str, Any, Any], bool],
    allowed: Callable[[Path, Exception], str | None],
) -> str:
    """Read `folder` both ways. "equal", "refused" by us with a `ValueError` that names a file, or an allowed kind.

    Raises `AssertionError` for everything else: another exception, another value, or a value where they have none.
    """
    try:
        got = ours(folder)
    except ValueError as error:
        message = str(error)
        named = NAMED_FILE.search(message.removeprefix(str(folder)))
        assert named, f"{what}: the refusal names no file: {message}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__} instead of a refusal: {error}") from error
    try:
        expected = theirs(folder)
    except Exception as error:  # of every kind
        if kind := allowed(folder, error):
            return kind
        raise AssertionError(f"{what}: we run what transformers refuses: {type(error).__name__}: {error}") from error
    for name, value in expected.items():
        assert same(name, got[name], value), f"{what}: {name} is {got[name]!r}, with transformers {value!r}"
    return "equal"
