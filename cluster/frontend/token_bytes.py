"""The bytes that a token stands for, which need not be whole characters."""

import json
import re
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer as Backend

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _alphabet() -> dict[str, int]:
    """The letter of each byte in byte-level BPE, as GPT-2's `bytes_to_unicode` has them: itself if it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + index): byte for index, byte in enumerate(unseen)}


BYTE_OF = _alphabet()


class TokenBytes:
    """Reads the vocabulary, where decoding a token alone would make U+FFFD of a part of a character.

    Knows byte-level BPE and sentencepiece's pieces, whose bytes without a piece of their own are `<0x00>` to `<0xFF>`.
    Added tokens stand for themselves.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        self._added = {token_id: token.content for token_id, token in backend.get_added_tokens_decoder().items()}
        steps = list(decoder_steps(json.loads(backend.decoder.__getstate__()))) if backend.decoder is not None else []
        kinds = {step["type"] for step in steps}
        self._by_letters = "ByteLevel" in kinds
        self._by_pieces = bool(kinds & {"ByteFallback", "Metaspace"})
        self._replaced = dict(filter(None, map(_replacement, steps)))

    def of(self, token_id: int) -> bytes | None:
        """None for an id that the tokenizer does not have, and where only whole texts can be decoded (WordPiece)."""
        known = self._known.get(token_id)
        if known is None and (known := self._read(token_id)) is not None:
            self._known[token_id] = known
        return known

    def _read(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return self._added[token_id].encode()
        piece = self._backend.id_to_token(token_id)
        if piece is None or not (self._by_letters or self._by_pieces):
            return None
        if self._by_letters:
            return bytes(BYTE_OF[letter] for letter in piece) if BYTE_OF.keys() >= {*piece} else piece.encode()
        if found := BYTE.fullmatch(piece):
            return bytes.fromhex(found[1])
        for old, new in self._replaced.items():
            piece = piece.replace(old, new)
        return piece.encode()


def decoder_steps(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A decoder's parts, one by one."""
    if decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from decoder_steps(part)
    else:
        yield decoder


def _replacement(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a part writes instead of what, such as a space for sentencepiece's mark of one."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    if step["type"] == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None
