"""Reads and checks API keys as an operator writes them. No message repeats one."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

KEY_FORM = "holds white space or characters that no header may have; write one key there, in printable ASCII"


def check_keys(keys: Sequence[str]) -> None:
    """Raises `ValueError` for a key that no client can send."""
    if not all(map(str.strip, keys)):
        raise ValueError("one of api_keys is empty; leave it out")
    if any(map(_cannot_be_sent, keys)):
        raise ValueError(f"one of api_keys {KEY_FORM}")


def keys_of_file(file: Path) -> list[str]:
    """One a line; empty lines do not count. Raises `ValueError` that names the file, for one without keys, too."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(
            f"api_keys_file {file} cannot be read: {cause}; name a text file with a key on each line, "
            "or leave it out to let everybody in"
        ) from error
    for number, line in enumerate(lines, start=1):
        if _cannot_be_sent(line):
            raise ValueError(f"line {number} of api_keys_file {file} {KEY_FORM}")
    if not any(lines):
        raise ValueError(
            f"api_keys_file {file} holds no key; write a key on each line, or leave it out to let everybody in"
        )
    return [line for line in lines if line]


def key_digest(key: str | bytes) -> bytes:
    """Enough to know a key by, and nothing to get in with."""
    return hashlib.sha256(key.encode() if isinstance(key, str) else key).digest()


def _cannot_be_sent(key: str) -> bool:
    return any(character.isspace() or not character.isascii() or not character.isprintable() for character in key)
