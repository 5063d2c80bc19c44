"""What the README, the Makefile and the wheel promise is there."""

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

from support import tree

ROOT = Path(__file__).parents[1]
ROOMS = ("deploy", "cluster", "workers", "models", "parallel")


def test_the_tree_has_every_file_and_says_what_it_is_for() -> None:
    files, folder = set(), ""
    for line in tree.lines(ROOT):
        name, _, purpose = line.strip().partition(" ")
        folder = folder if line.startswith(" ") else name
        assert purpose or not name.endswith((".py", "/")) or folder == "deploy/manifests/", (
            f"{folder}{name} says nothing"
        )
        files.add(folder + name)
    paths = [path for room in ROOMS for path in (ROOT / room).rglob("*.py") if path.stem != "__init__"]
    assert files >= {path.relative_to(ROOT).as_posix() for path in paths}


def test_a_wheel_has_every_file_that_is_no_python() -> None:
    """Those of the rooms, which a wheel leaves out if no pattern names them."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    paths = [path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file()]
    files = [path for path in paths if path.suffix not in (".py", ".pyc")]
    assert Path("deploy/openai/middleware/playground.html") in files
    for file in files:
        assert any(
            fnmatch(".".join(["eagleray", *file.parts]), f"{package}.{pattern.replace('/', '.')}")
            for package, of_package in patterns.items()
            for pattern in of_package
        ), f"{file} is in no wheel"


def test_the_commands_that_the_readme_promises_are_in_the_makefile() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    promised = set(re.findall(r"\bmake (\w+)", (ROOT / "README.md").read_text()))
    assert promised <= targets
    assert {"demo", "test", "check", "bench", "docs"} <= targets


def test_the_readme_is_short_and_leads_to_what_is_there() -> None:
    for name in ("README.md", "CONTRIBUTING.md", "deploy/manifests/README.md"):
        text = (ROOT / name).read_text()
        assert len(text.encode()) <= 8 << 10, f"{name} grows: what it says belongs in docs"
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert ((ROOT / name).parent / link).exists(), f"{name} leads to {link}"
