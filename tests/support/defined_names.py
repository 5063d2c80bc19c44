"""What is defined in Python sources, read from their syntax trees: names, attributes of classes, words of texts."""

import ast
import re
from collections.abc import Iterable
from pathlib import Path


class DefinedNames:
    """Comments and docstrings define nothing."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.names: set[str] = set()  # functions, classes, arguments, variables, attributes that are assigned, imports
        self.words: set[str] = set()  # of texts within code, such as keys, environment variables and metrics
        self._attributes: dict[str, set[str]] = {}  # by class
        self._bases: dict[str, set[str]] = {}
        for file in files:
            tree = ast.parse(file.read_text())
            docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                self._take(node, docstrings)

    def has_attribute(self, owner: str, name: str) -> bool:
        """Whether a class of this name, or one that it is derived from, has it."""
        if name in self._attributes.get(owner, ()):
            return True
        return any(self.has_attribute(base, name) for base in self._bases.get(owner, ()))

    def _take(self, node: ast.AST, docstrings: set[int]) -> None:
        self.names.update(_names(node))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            self.words.update(re.findall(r"\w+", node.value))
        if isinstance(node, ast.ClassDef):
            own = (name for each in ast.walk(node) if each is not node for name in _names(each, arguments=False))
            self._attributes.setdefault(node.name, set()).update(own)
            self._bases.setdefault(node.name, set()).update(ast.unparse(base).split(".")[-1] for base in node.bases)


def _names(node: ast.AST, arguments: bool = True) -> list[str]:
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.arg(arg=name) | ast.keyword(arg=str(name)) | ast.alias(name=name) if arguments:
            return [name]
        case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return [name]
    return []
