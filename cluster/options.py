"""An option is described once, where its dataclass declares it: default, bounds, help. Checks, the command line, the
HTTP schema and the documentation are made of that.

    top_p: float = option(1.0, "draw from the likeliest tokens that together have this probability", (0, 1))
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cached_property
from types import MappingProxyType, NoneType
from typing import Any, TypeVar, get_args, get_type_hints

T = TypeVar("T")
KEY = "option"  # in a field's metadata
NULL = "null"  # how None is written in JSON and YAML


@dataclass(frozen=True, kw_only=True)
class Option:
    """One field of a dataclass, as those who set it see it."""

    name: str
    hint: Any  # its declared type
    default: Any  # `MISSING` where there is none
    help: str  # what it does: one line without a capital or a full stop
    bounds: tuple[float, float] | None = None  # of a number, themselves allowed
    excluded: float | None = None  # a number that is not allowed though it is within the bounds, often the lower one
    choices: tuple[str, ...] = ()
    min_length: int = 0  # of a text or a list
    max_length: int | None = None  # of a list
    allowed: str = ""  # in words, after "give", where type and bounds do not say it well
    none: str = ""  # what None stands for, after "or None", or the reader's own word for it
    note: str = ""  # what some value means
    example: Any = None  # a value that shows what it does; the HTTP schema tells it, and a test sees its effect
    of_model: bool = False  # a sampling option that the model's generation_config.json may set
    random: bool = False  # a sampling option that matters only where chance decides, so not in greedy requests

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is MISSING

    @cached_property
    def optional(self) -> bool:
        """Whether None is a value."""
        return NoneType in get_args(self.hint)

    @cached_property
    def kind(self) -> str:
        """The declared type in words, None left out."""
        name = self.hint.__name__ if isinstance(self.hint, type) else str(self.hint)
        return name.removesuffix(" | None")

    def values(self, none: str = "None") -> str:
        """Which values it takes, in words, for a reader who writes None as `none`."""
        words = self.allowed or ", ".join(self.choices) or _bounds(self) or _KINDS[self.kind][1]
        return f"{words}, or {none}{self.none and f' {self.none}'}" if self.optional else words

    def remedy(self, none: str = "None") -> str:
        """What to do about another value, for such a reader."""
        return f"{'choose one of' if self.choices else 'give'} {self.values(none)}{self.note and f'; {self.note}'}"

    @property
    def text(self) -> str:
        """What it does, and what some value means."""
        return f"{self.help}{self.note and f'; {self.note}'}"

    def holds(self, value: object) -> bool:
        """Whether the field may be `value`."""
        if value is None:
            return self.optional
        if not _KINDS[self.kind][0](value) or (self.choices and value not in self.choices):
            return False
        if isinstance(value, str | list | tuple) and len(value) < self.min_length:
            return False
        return self.bounds is None or self.within(value)  # type: ignore[arg-type]

    def within(self, value: float) -> bool:
        """Whether a number is one of those that the bounds allow."""
        low, high = self.bounds or (-math.inf, math.inf)
        return low <= value <= high and value != self.excluded


def option(default: T, help: str, bounds: tuple[float, float] | None = None, **said: Any) -> T:
    """A field of a dataclass with a default. `said` is what else `Option` has."""
    return field(default=default, metadata=described(help, bounds=bounds, **said))


def described(help: str, **said: Any) -> Mapping[str, Any]:
    """The metadata of a field that is an option, for those without a default. pydantic reads the description."""
    return {KEY: {"help": help, **said}, "description": help}


def options(owner: type[Any]) -> Mapping[str, Option]:
    """The options of a dataclass by name, in order."""
    if owner not in _OPTIONS:
        hints = get_type_hints(owner)
        said = {each.name: each for each in fields(owner) if KEY in each.metadata}
        _OPTIONS[owner] = {
            name: Option(name=name, hint=hints[name], default=each.default, **each.metadata[KEY])
            for name, each in said.items()
        }
    return MappingProxyType(_OPTIONS[owner])


_OPTIONS: dict[type[Any], dict[str, Option]] = {}  # made once


class OptionError(ValueError):
    """An option has a value that it does not take."""

    def __init__(self, option: Option, value: object) -> None:
        super().__init__(option, value)
        self.option = option
        self.value = value

    def words(self, none: str) -> str:
        """Name, value and remedy, for a reader who writes None as `none`."""
        return f"{self.option.name} is {self.value!r}; {self.option.remedy(none)}"

    def __str__(self) -> str:
        return self.words("None")


def check(instance: Any) -> None:
    """Raise `ValueError`, naming field, value and remedy, for the first option with a value that it does not take."""
    for name, each in options(type(instance)).items():
        if not each.holds(value := getattr(instance, name)):
            raise OptionError(each, value)
        if each.max_length is not None and value is not None and len(value) > each.max_length:
            raise ValueError(f"{name} has {len(value)} items; give at most {each.max_length}")


def check_text(text: str, name: str = "the text") -> None:
    """Raise `ValueError` for a string that is not Unicode text, such as one with half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at position {error.start}, which is not a character; give UTF-8 text"
        ) from None


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return is_int(value) or (isinstance(value, float) and math.isfinite(value))


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and all(is_int(item) for item in value)


def _is_strings(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list | tuple) and all(isinstance(item, str) for item in value))


def _is_list_of_strings(value: object) -> bool:
    return not isinstance(value, str) and _is_strings(value)


def _is_biases(value: object) -> bool:
    return isinstance(value, dict) and all(is_int(key) and is_number(bias) for key, bias in value.items())


_KINDS: dict[str, tuple[Callable[[object], bool], str]] = {  # declared type -> whether a value is of it, and in words
    "int": (is_int, "a whole number"),
    "float": (is_number, "a finite number"),
    "bool": (lambda value: isinstance(value, bool), "True or False"),
    "str": (lambda value: isinstance(value, str), "a text"),
    "list[int]": (_is_token_ids, "a list of token ids"),
    "list[str]": (_is_list_of_strings, "a list of strings"),
    "str | list[str]": (_is_strings, "a string or a list of strings"),
    "dict[int, float]": (_is_biases, "a dict from token ids to finite numbers"),
}


def _bounds(each: Option) -> str:
    if each.bounds is None:
        return ""
    low, high = each.bounds
    kind = "a whole number" if each.kind == "int" else "a number"
    if each.excluded == low:
        return f"{kind} above {_number(low)}, up to {_number(high)}"
    return f"{kind} from {_number(low)} to {_number(high)}"


def _number(value: float) -> str:
    """Large limits as powers of two."""
    if not isinstance(value, int):
        return f"{value:g}"
    if abs(value) >= 2**31 - 1:
        size = abs(value) + (value > 0)
        if size & (size - 1) == 0:
            return f"{'-' * (value < 0)}2**{size.bit_length() - 1}{' - 1' * (value > 0)}"
    return str(value)
