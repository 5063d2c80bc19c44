"""Reads the small JSON files of a checkpoint and checks their values. Whatever is wrong is a `ValueError` with the
key.
"""

import json
import sys
from collections.abc import Mapping
from os.path import isfile
from pathlib import Path
from typing import Any

MAX_BYTES = 16 << 20  # of a small file: what JSON of this size holds takes at most some hundred megabytes
MAX_SHOWN = 80  # characters of a value in a message
KINDS = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}


def read_text(file: Path, max_bytes: int = MAX_BYTES) -> str:
    """A small file's text. Raises `ValueError` that names the file if it is too large, or not UTF-8."""
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{file} has {size} bytes, and {max_bytes} is the limit; fetch the file again")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}; fetch the file again") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def read_object(file: Path, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """A JSON object; an empty one if there is no such file. Raises `ValueError` that names the file and the remedy."""
    if not isfile(file):
        return {}
    text = read_text(file, max_bytes)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}; fetch the file again") from error
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply; fetch the file again") from None
    if not isinstance(content, dict):
        kind = KINDS.get(type(content), "a number")
        raise ValueError(f"{file} contains {kind}, not an object; fetch the file again")
    return content


def shown(value: object) -> str:
    """A value for a message: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def whole(raw: Mapping[str, Any], key: str, limit: int, *, least: int = 1) -> int:
    """A whole number from `least` to `limit`."""
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key} is {shown(value)}; a whole number of at least {least} is needed")
    if value > limit:
        raise ValueError(f"{key} is {shown(value)}; at most {limit} is supported")
    return value


def number(raw: Mapping[str, Any], key: str) -> float:
    """A finite number above 0."""
    value = raw.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max:
        return float(value)
    raise ValueError(f"{key} is {shown(value)}; a number above 0 is needed")


def fraction(raw: Mapping[str, Any], key: str) -> float:
    """A number above 0 that is written with a decimal point, which transformers insists on for some keys."""
    if type(raw.get(key)) is int:
        raise ValueError(f"{key} is {shown(raw[key])}; write it with a decimal point")
    return number(raw, key)


def flag(raw: Mapping[str, Any], key: str) -> bool:
    """True or false."""
    value = raw.get(key)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {shown(value)}; true or false is needed")
    return value
