"""Shortens a request's values for messages and logs."""

from itertools import islice

MAX_SHOWN = 80  # characters
MAX_WORDS = 1000  # characters of a message that others have worded, and which may repeat values whole


def excerpt(value: object) -> str:
    """The beginning of its `repr`. Takes no longer for a long one."""
    return truncate(repr(_beginning(value, 3)), MAX_SHOWN)


def truncate(text: str, max_length: int) -> str:
    """A text, or its beginning and a sign that there was more."""
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def _beginning(value: object, depth: int) -> object:
    if isinstance(value, str):
        return value[: MAX_SHOWN + 1]
    if isinstance(value, list):
        return [_beginning(each, depth - 1) for each in value[:MAX_SHOWN]] if depth else "…"
    if isinstance(value, dict):
        some = islice(value.items(), MAX_SHOWN)
        return {name[: MAX_SHOWN + 1]: _beginning(each, depth - 1) for name, each in some} if depth else "…"
    return value
