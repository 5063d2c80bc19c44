"""Documents the fields of dataclasses by what the command line says of them and by the comments beside them.

Our dataclasses describe a field in the comment at the end of its line, and only where its name does not say enough.
"""

import ast
import io
import tokenize
from typing import Any

from griffe import Attribute, Docstring, Extension, ObjectNode

from eagleray.deploy.cli.arguments import ENGINE_RENAMED, Parser
from eagleray.deploy.cli.main import COMMANDS, _named

GROUPS = {"SamplingParams": ("sampling", {}), "EngineConfig": ("engine", ENGINE_RENAMED)}


class Comments(Extension):
    """For attributes of classes that have no docstring of their own."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: Any) -> None:
        """Called by griffe for every attribute that it finds."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class:
            sentences = [text for text in (_help(attr), _comment(attr)) if text]
            if sentences:
                attr.docstring = Docstring("\n\n".join(sentences), parent=attr)


def _help(attr: Attribute) -> str:
    """What the command line says of a field; empty for those that it has no option for."""
    group, renamed = GROUPS.get(attr.parent.name, (None, {}))
    if group is None:
        return ""
    parser = Parser(prog="eagleray")
    _named(COMMANDS["generate"].add_arguments)(parser)
    (found,) = (each for each in parser._action_groups if each.title == group)
    texts = {action.dest: action.help for action in found._group_actions}
    return _sentence((texts.get(renamed.get(attr.name, attr.name)) or "").partition(" (default:")[0])


def _comment(attr: Attribute) -> str:
    """The last comment in the lines of an assignment; empty if there is none."""
    source = "\n".join(line.strip() for line in attr.lines)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except tokenize.TokenError:
        return ""
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    return _sentence(comments[-1]) if comments else ""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""
