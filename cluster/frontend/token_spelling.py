"""What a token adds to a text, as far as the token alone determines it."""

import json
from functools import cached_property
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from eagleray.cluster.frontend.token_bytes import BYTE, BYTE_OF, decoder_steps

LETTER = "a"  # stands for what came before
BY_PIECES = frozenset({"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"})  # each token for itself
FIRST_DIFFERS = frozenset({"Metaspace", "WordPiece"})


class Spelling:
    """Bytes for byte-level decoders; for those of pieces characters, and a single byte for what has no piece."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[int, bytes | str] = {}

    @cached_property
    def kind(self) -> Literal["bytes", "pieces", "other"]:
        """What `of` gives; nothing that could be relied on of `other`."""
        kinds = [step["type"] for step in self._steps]
        if kinds in (["ByteLevel"], ["ByteLevel", "Fuse"]):
            return "bytes"
        each, whole = kinds[: self._fuse], kinds[self._fuse + 1 :]
        if not each or not BY_PIECES.issuperset(each) or self._backend.decoder.decode([LETTER]) != LETTER:
            return "other"
        if whole and (self.stripped is None or FIRST_DIFFERS & {*each}):
            return "other"
        return "pieces"

    @cached_property
    def stripped(self) -> tuple[str, int] | None:
        """For pieces: the character that is left out at the start of a text, and how often."""
        match self._steps[self._fuse + 1 :]:
            case [{"type": "Strip", "content": str(character), "start": int(number), "stop": 0}]:
                return character, number
            case _:
                return None

    @cached_property
    def first_differs(self) -> bool:
        """For pieces: whether the first token of a text must be spelt by `first`."""
        return any(step["type"] in FIRST_DIFFERS for step in self._steps)

    def of(self, token_id: int) -> bytes | str | None:
        """None for an id that the tokenizer does not have."""
        spelt = self._known.get(token_id)
        if spelt is None and (piece := self._backend.id_to_token(token_id)) is not None:
            spelt = self._known[token_id] = self._spelt(piece)
        return spelt

    def first(self, token_id: int) -> str:
        """The text of a piece before which nothing is."""
        text: str = self._backend.decoder.decode([self._backend.id_to_token(token_id)])
        return text

    def _spelt(self, piece: str) -> bytes | str:
        if self.kind == "bytes":
            return bytes(BYTE_OF[letter] for letter in piece) if BYTE_OF.keys() >= {*piece} else piece.encode()
        if self._has_bytes and (found := BYTE.fullmatch(piece)):
            return bytes.fromhex(found[1])
        text: str = self._backend.decoder.decode([LETTER, piece])
        return text.removeprefix(LETTER)

    @cached_property
    def _has_bytes(self) -> bool:
        return any(step["type"] == "ByteFallback" for step in self._steps)

    @cached_property
    def _steps(self) -> list[dict[str, Any]]:
        decoder = self._backend.decoder
        return [] if decoder is None else list(decoder_steps(json.loads(decoder.__getstate__())))

    @property
    def _fuse(self) -> int:
        """Where the tokens become one text."""
        kinds = [step["type"] for step in self._steps]
        return kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
