"""Values of a type: what annotations allow, variant by variant, so that no variant is left out."""

import types
import typing
from collections.abc import Iterable
from typing import Any

PLAIN: dict[Any, list[Any]] = {
    str: ["text"],
    int: [1],
    float: [0.5],
    bool: [True, False],
    object: ["anything"],
    type(None): [None],
}


def values(kind: Any) -> list[Any]:
    """Every variant of a union and every literal; of objects the least, and that with each optional field in turn."""
    if kind in PLAIN:
        return PLAIN[kind]
    if hasattr(kind, "__required_keys__"):  # of typing's or typing_extensions' TypedDict
        return _objects(kind)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return [value for each in inner for value in values(each)]
    if origin is typing.Literal:
        return [*inner]
    if origin is dict:
        return [{}, *({"key": value} for value in values(inner[1]))]
    assert isinstance(origin, type), f"{kind} is of a kind that is not known here"
    assert issubclass(origin, Iterable), f"{kind} is of a kind that is not known here"
    return [[], *([value] for value in values(inner[0]))]


def fields(kind: Any) -> dict[str, Any]:
    """The fields of an object and their types."""
    return typing.get_type_hints(kind, include_extras=False)


def _objects(kind: Any) -> list[Any]:
    hints = fields(kind)
    marked = typing.get_type_hints(kind, include_extras=True)
    required = [name for name, each in marked.items() if typing.get_origin(each) is typing.Required]
    least = {name: values(hints[name])[0] for name in required}
    return [least, *(least | {name: value} for name, each in hints.items() for value in values(each))]
