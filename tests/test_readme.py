"""The README's tree is the tree."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("deploy", "cluster", "workers", "models", "parallel")


def files_in_tree(readme: str) -> set[str]:
    """`room/file.py` for every line of the tree that has a name and a description."""
    tree = readme.split("## The tree")[1].split("```")[1]
    files, room = set(), ""
    for line in tree.splitlines():
        if found := re.fullmatch(r"(\S+)/ +\S.*", line):
            room = found[1]
        elif found := re.fullmatch(r"  (\S+\.py) +\S.*", line):
            files.add(f"{room}/{found[1]}")
    return files


def test_every_file_has_its_line_and_every_line_its_file() -> None:
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.stem != "__init__"]
    files = {path.relative_to(ROOT).as_posix() for path in paths}
    assert files_in_tree((ROOT / "README.md").read_text()) == files


def test_a_wheel_has_every_file_that_is_no_python() -> None:
    """Those of the rooms, which a wheel leaves out if no pattern names them."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    paths = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    files = [path for path in paths if path.suffix not in (".py", ".pyc")]
    assert Path("deploy/openai/playground.html") in files
    for file in files:
        package = ".".join(["eagleray", *file.parent.parts])
        assert any(fnmatch(file.name, pattern) for pattern in patterns[package]), f"{file} is in no wheel"


def test_a_line_without_a_description_does_not_count() -> None:
    tree = "## The tree\n```\ncluster/  what\n  a.py  words\n  b.py\n```\n"
    assert files_in_tree(tree) == {"cluster/a.py"}


def test_the_commands_that_the_readme_promises_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    promised = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert promised <= targets
    assert {"demo", "test", "check", "bench"} <= targets
