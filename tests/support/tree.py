"""Print every source file with the first sentence of its docstring: `make tree`."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOMS = ("deploy", "cluster", "workers", "models", "parallel")


def lines(root: Path) -> Iterator[str]:
    """Folders, what they are for, and below each its files. Those without Python have names only."""
    for room in ROOMS:
        folders = [root / room, *sorted(path for path in (root / room).rglob("*") if path.is_dir())]
        for folder in folders:
            files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".pyc")
            if files:
                yield f"{folder.relative_to(root).as_posix() + '/':<34}{purpose(folder / '__init__.py')}".rstrip()
                yield from (f"  {file.name:<32}{purpose(file)}".rstrip() for file in files if file.stem != "__init__")


def purpose(file: Path) -> str:
    """The first sentence of a module's docstring; empty if it has none."""
    if file.suffix != ".py" or not file.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(file.read_text())) or ""
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return paragraph.partition(". ")[0].removesuffix(".")


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in lines(Path(__file__).parents[2]))
