"""Documents the fields of dataclasses by what their options say, or by the comments beside them.

Other dataclasses describe a field in the comment at the end of its line, and only where its name does not say enough.
"""

import ast
import io
import tokenize
from typing import Any

from griffe import Attribute, Docstring, Extension, ObjectNode

from eagleray.cluster.config import EngineConfig
from eagleray.cluster.options import options
from eagleray.cluster.sampling_params import SamplingParams

OWNERS = {"SamplingParams": SamplingParams, "EngineConfig": EngineConfig}


class Comments(Extension):
    """For attributes of classes that have no docstring of their own."""

    def on_attribute_instance(self, *, node: ast.AST | ObjectNode, attr: Attribute, **_: Any) -> None:
        """Called by griffe for every attribute that it finds."""
        if attr.docstring is None and attr.parent is not None and attr.parent.is_class:
            sentences = [text for text in (_help(attr), _comment(attr)) if text]
            if sentences:
                attr.docstring = Docstring("\n\n".join(sentences), parent=attr)


def _help(attr: Attribute) -> str:
    """What an option says of itself and which values it takes; empty for other fields."""
    owner = OWNERS.get(attr.parent.name)
    option = None if owner is None else options(owner).get(attr.name)
    if option is None:
        return ""
    return "\n\n".join(text for text in (_sentence(option.text), _sentence(option.values())) if text)


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
