"""The pages of the documentation, and what can be checked in them: blocks, commands, names and links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/manifests/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # which may go on in the next line
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@dataclass(frozen=True)
class Block:
    """What stands between fences. One without a language is of commands."""

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class CommandLine:
    """One program and its words: neither what comes before it or after it in a pipe, nor where its output goes."""

    where: str
    words: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for found in _BLOCK.finditer(text):
            yield Block(name_of(page), text.count("\n", 0, found.start()) + 1, found[1], found[2])


def commands() -> Iterator[CommandLine]:
    for block in blocks():
        if block.language == "":
            for number, line in enumerate(block.text.replace("\\\n", " ").splitlines(), block.line + 1):
                for words in programs(line):
                    yield CommandLine(f"{block.page}:{number}", tuple(words))


def programs(line: str) -> list[list[str]]:
    """The words of each program of a line, without comments, variables before a program, and redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if word == "|":
            found.append([])
        elif word in (">", "<"):
            next(words)
        elif found[-1] or not _ASSIGNMENT.match(word):
            found[-1].append(word)
    return [each for each in found if each]


def names() -> Iterator[tuple[str, str]]:
    """Each page's name with each code that stands within its lines."""
    for page in PAGES:
        for code in _CODE.findall(_BLOCK.sub("", page.read_text())):
            yield name_of(page), " ".join(code.split())


def links(page: Path) -> list[Path]:
    """The files that a page leads to."""
    return [page.parent / link for link in _LINK.findall(_BLOCK.sub("", page.read_text()))]
