"""Makes command-line options from those of a dataclass (`cluster/options.py`)."""

import argparse
import types
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from eagleray.cluster.options import Option, options

SERVED_MODEL_NAME = "name by which requests ask for the model; its directory's, or OWNER/NAME, if not given"


def add_options(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup",
    owner: type[Any],
    names: Collection[str] | None = None,
    *,
    renamed: Mapping[str, str] = types.MappingProxyType({}),
    aliases: Mapping[str, str] = types.MappingProxyType({}),
    notes: Mapping[str, str] = types.MappingProxyType({}),
    defaults: Mapping[str, Any] = types.MappingProxyType({}),
    model_first: Mapping[str, Any] = types.MappingProxyType({}),
    hidden: Collection[str] = (),
) -> None:
    """Give `parser` an option for every one of the dataclass `owner` that has a default, or for those of `names`.

    An option that is not given leaves no trace in the parsed arguments, so that the dataclass's own default holds;
    `defaults` names those for which the command line has another, `renamed` those that it calls by another name,
    `notes` what else it says about some, and `model_first` what holds for some if the model does not say either. No
    help shows those that are `hidden`, which the command knows only to refuse them in its own words.
    """
    for name, option in options(owner).items():
        if option.required or (names is not None and name not in names):
            continue
        dest = renamed.get(name, name)
        flags = [f"--{dest.replace('_', '-')}"] + ([aliases[name]] if name in aliases else [])
        reader = {"choices": option.choices} if option.choices else _reader(option)
        text = "; ".join([option.text] + ([notes[name]] if name in notes else []))
        text = _help(text, defaults.get(name, model_first.get(name, option.default)), name in model_first)
        text = argparse.SUPPRESS if name in hidden else text
        parser.add_argument(*flags, dest=dest, default=defaults.get(name, argparse.SUPPRESS), help=text, **reader)


def given(
    owner: type[Any], arguments: argparse.Namespace, renamed: Mapping[str, str] = types.MappingProxyType({})
) -> dict[str, Any]:
    """The fields of `owner` for which an option was given."""
    options = {field.name: renamed.get(field.name, field.name) for field in fields(owner)}
    return {name: getattr(arguments, option) for name, option in options.items() if hasattr(arguments, option)}


def token_ids(text: str) -> list[int]:
    """`1,2,3`"""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of token ids such as 1,2,3") from None


def token_biases(text: str) -> dict[int, float]:
    """`12=-1.5,7=100`"""
    try:
        pairs = (part.split("=") for part in text.split(","))
        return {int(token): float(bias) for token, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of token ids and biases such as 12=-1.5,7=100"
        ) from None


def optional(read: type[Any]) -> Any:
    """A reader of `read`'s values that also takes `none`, or `None` as messages say it."""

    def read_or_none(text: str) -> Any:
        return None if text.lower() == "none" else read(text)

    read_or_none.__name__ = read.__name__  # argparse puts it in its complaint
    return read_or_none


_READERS: dict[Any, dict[str, Any]] = {
    bool: {"action": argparse.BooleanOptionalAction},
    int: {"type": int, "metavar": "N"},
    int | None: {"type": optional(int), "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    str: {"metavar": "TEXT"},
    list[int] | None: {"type": token_ids, "metavar": "ID,ID,…"},
    str | None: {"metavar": "TEXT"},
    list[str] | None: {"action": "append", "metavar": "TEXT"},
    str | list[str] | None: {"action": "append", "metavar": "TEXT"},
    dict[int, float] | None: {"type": token_biases, "metavar": "ID=X,ID=X,…"},
}


def _reader(option: Option) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if option.hint not in _READERS:
        raise TypeError(f"no option can be made for a field of type {option.hint}; add it to _READERS")
    return _READERS[option.hint]


def _help(text: str, default: Any, model_first: bool) -> str:
    first = "the model's, or else " if model_first else ""
    shown = text if default is None else f"{text} (default: {first}{default})"
    return shown.replace("%", "%%")
