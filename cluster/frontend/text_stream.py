"""Converts token ids to text as they arrive, in constant work per token, equal to decoding them all at once.

Where single bytes stand for what has no piece, the library makes U+FFFD of a whole row of them if one is wrong; here
those stay that were shown before it came.
"""

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from copy import copy
from itertools import islice
from typing import Protocol, Self

from eagleray.cluster.frontend.token_spelling import Spelling
from eagleray.cluster.frontend.tokenizer import Tokenizer

LOST = "\N{REPLACEMENT CHARACTER}"
MAX_PENDING = 3  # bytes of a character that is not complete; tokens, where nothing is known of them
CONTEXT_TOKENS = 8  # that are decoded again before new ones, where nothing is known of them


class TextStream:
    """What is generated after a prompt: the prompt's text and this together are the text of all tokens.

    A character that the prompt's last tokens begin is completed here, whole. If it never is, it is the prompt's U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        skipped = self._skipped_ids = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._growing = _growing(tokenizer, skip_special_tokens)
        for token_id in (token_id for token_id in prompt_token_ids if token_id not in skipped):
            if not self._growing.at_start:
                break
            self._growing.add(token_id)
        if not self._growing.at_start:
            self._growing.go_on_after(token_id for token_id in reversed(prompt_token_ids) if token_id not in skipped)
        self._owed = self._growing.num_pending
        self.num_kept = 0  # of those that were owed, and are to stay

    @property
    def num_owed(self) -> int:
        """How many U+FFFD at the end of the prompt's text may still become a character."""
        return self._owed

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token: nothing while a character may yet be completed."""
        return "" if token_id in self._skipped_ids else self._news(self._growing.add(token_id))

    def flush(self) -> str:
        """What `push` still holds back, an incomplete character as U+FFFD. Nothing may be pushed afterwards."""
        return self._news(self._growing.end())

    def copy(self) -> Self:
        """Another that goes on from here."""
        other = copy(self)
        other._growing = self._growing.copy()
        return other

    def _news(self, text: str) -> str:
        """Without the prompt's own."""
        if not (self._owed and text):
            return text
        self.num_kept = min(self._owed, len(text) - len(text.lstrip(LOST)))
        self._owed = 0
        return text[self.num_kept :]


class Growing(Protocol):
    """How a text grows, by the kind of tokenizer."""

    @property
    def at_start(self) -> bool:
        """Whether the next token's text depends on there being none before."""

    @property
    def num_pending(self) -> int:
        """How many U+FFFD end the text, if this is its end."""

    def go_on_after(self, last: Iterable[int]) -> None:
        """Start after a text whose last tokens are these, the very last one first."""

    def add(self, token_id: int) -> str: ...
    def end(self) -> str: ...
    def copy(self) -> Self: ...


def _growing(tokenizer: Tokenizer, skip_special_tokens: bool) -> Growing:
    match tokenizer.spelling.kind:
        case "bytes":
            return BytesText(tokenizer.spelling)
        case "pieces":
            return PiecesText(tokenizer.spelling)
        case _:
            return OtherText(tokenizer, skip_special_tokens)


class BytesText:
    """Every token is some bytes of UTF-8."""

    at_start = False

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._pending = b""  # the beginning of a character

    @property
    def num_pending(self) -> int:
        return 1 if self._pending else 0

    def go_on_after(self, last: Iterable[int]) -> None:
        found = b""
        for token_id in last:
            found = (self._spelt(token_id) + found)[-MAX_PENDING:]
            if len(found) == MAX_PENDING:
                break
        self._decode(found)

    def add(self, token_id: int) -> str:
        return self._decode(self._pending + self._spelt(token_id))

    def end(self) -> str:
        return LOST * self.num_pending

    def copy(self) -> "BytesText":
        return copy(self)

    def _decode(self, spelt: bytes) -> str:
        text, num_used = utf_8_decode(spelt, "replace", False)
        self._pending = spelt[num_used:]
        if b"\xed\xa0" <= self._pending < b"\xee":  # half of a surrogate, of which Python waits for the last byte
            text, self._pending = text + LOST * len(self._pending), b""
        return text

    def _spelt(self, token_id: int) -> bytes:
        spelt = self._spelling.of(token_id) or b""
        assert isinstance(spelt, bytes), "the vocabulary is of bytes"
        return spelt


class PiecesText:
    """A token is a text, or a byte. Bytes in a row are read together, and once one is wrong, all that follow are."""

    def __init__(self, spelling: Spelling) -> None:
        self._spelling = spelling
        self._begun = not spelling.first_differs
        self._stripped, self._most_to_strip = spelling.stripped or ("", 0)
        self._num_to_strip = self._most_to_strip
        self._pending = b""
        self._wrong = False

    @property
    def at_start(self) -> bool:
        return not self._begun or self._num_to_strip > 0

    @property
    def num_pending(self) -> int:
        return len(self._pending)

    def go_on_after(self, last: Iterable[int]) -> None:
        """A row of bytes that ends within a character is read anew with what follows: as it is, all of it is U+FFFD."""
        row, from_start = [], True
        for spelt in map(self._spelling.of, last):
            if isinstance(spelt, str):
                from_start = False
                break
            row.append(spelt or b"")
        self._pending, self._wrong = b"", False
        self._add_byte(b"".join(reversed(row)))
        if self._pending and from_start:
            self._num_to_strip = self._most_to_strip

    def add(self, token_id: int) -> str:
        spelt = self._spelling.of(token_id)
        if spelt is None:
            return ""
        text = self._add_byte(spelt) if isinstance(spelt, bytes) else self.end() + self._text(token_id, spelt)
        self._begun = True
        return self._without_start(text) if self._num_to_strip else text

    def end(self) -> str:
        lost = LOST * len(self._pending)
        self._pending, self._wrong = b"", False
        return lost

    def copy(self) -> "PiecesText":
        return copy(self)

    def _text(self, token_id: int, spelt: str) -> str:
        return spelt if self._begun else self._spelling.first(token_id)

    def _add_byte(self, byte: bytes) -> str:
        """One, or a whole row."""
        if self._wrong:
            return LOST * len(byte)
        self._pending += byte
        try:
            text = self._pending.decode()
        except UnicodeDecodeError as error:
            if error.end == len(self._pending) and error.reason == "unexpected end of data":
                return ""
            text, self._wrong = LOST * len(self._pending), True
        self._pending = b""
        return text

    def _without_start(self, text: str) -> str:
        while self._num_to_strip and text.startswith(self._stripped):
            text = text[len(self._stripped) :]
            self._num_to_strip -= 1
        if text:
            self._num_to_strip = 0
        return text


class OtherText:
    """A token's text may depend on those before it: the last ones are decoded with and without those that are new."""

    at_start = False

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._context: list[int] = []
        self._pending: list[int] = []  # tokens after `_context` whose text is not out yet

    @property
    def num_pending(self) -> int:
        return 0

    def go_on_after(self, last: Iterable[int]) -> None:
        self._context = [*islice(last, CONTEXT_TOKENS)][::-1]

    def add(self, token_id: int) -> str:
        self._pending.append(token_id)
        text = self._new()
        if text.endswith(LOST) and len(self._pending) <= MAX_PENDING:
            return ""
        return self._out(text)

    def end(self) -> str:
        return self._out(self._new())

    def copy(self) -> "OtherText":
        other = OtherText(self._tokenizer, self._skip_special_tokens)
        other._context, other._pending = self._context.copy(), self._pending.copy()
        return other

    def _new(self) -> str:
        before, both = self._decode(self._context), self._decode(self._context + self._pending)
        return both[len(before) :] if both.startswith(before) else self._decode(self._pending)

    def _out(self, text: str) -> str:
        self._context, self._pending = (self._context + self._pending)[-CONTEXT_TOKENS:], []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
