"""Decodes text as UTF-8 and names the encoding of what is not."""

import codecs

BOM = codecs.BOM_UTF8
REMEDY = "save it as UTF-8, or convert it: iconv -f UTF-16 -t UTF-8"


def utf8_text(data: bytes, origin: str) -> str:
    """Without a byte order mark. Raises `ValueError` that names the origin."""
    check_utf8(data, origin)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not UTF-8 text: {error}; save it as UTF-8") from error


def check_utf8(data: bytes, origin: str) -> None:
    """Raise `ValueError` for what is UTF-16 or UTF-32: it has a mark of its own, or zeros, which no text has."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise ValueError(f"{origin} is not UTF-8 text, but UTF-16 or no text at all; {REMEDY}")
