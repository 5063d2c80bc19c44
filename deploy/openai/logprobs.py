"""Log-probabilities in the formats of the two endpoints."""

from collections.abc import Sequence
from copy import copy
from typing import Self

from eagleray.cluster.frontend.text_stream import TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer
from eagleray.cluster.outputs import Logprob
from eagleray.deploy.openai.responses import (
    ChatLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TextLogprobs,
    TokenLogprob,
    TopLogprob,
)

LOWEST = -9999.0  # JSON has no minus infinity; vLLM writes the same
Entry = dict[int, Logprob]  # the token itself first, then the most likely ones


def prompt_logprobs(entries: Sequence[Entry | None], num_top: int) -> PromptLogprobs:
    """vLLM's form: by token id, the token itself first."""
    return [None if entry is None else _by_id(entry) for entry in fewer(entries, num_top)]


def _by_id(entry: Entry) -> dict[int, PromptLogprob]:
    return {
        token_id: PromptLogprob(logprob=_finite(each), rank=each.rank, decoded_token=each.decoded_token)
        for token_id, each in entry.items()
    }


def fewer(entries: Sequence[Entry | None], num_top: int) -> list[Entry | None]:
    """Each with no more than `num_top` of the most likely tokens beside its own."""
    return [None if entry is None else _fewer(entry, num_top) for entry in entries]


def _fewer(entry: Entry, num_top: int) -> Entry:
    own = next(iter(entry))
    return {token_id: each for token_id, each in entry.items() if token_id == own or each.rank <= num_top}


class Offsets:
    """Where each token's text begins, in characters: the text before it that is certain.

    Of the tokens after `context`; with `echoed`, the text that these were given as and that is repeated, of them first.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        context: Sequence[int],
        *,
        skip_special_tokens: bool,
        echoed: str | None = None,
    ) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer, context, skip_special_tokens)
        self._known = [] if tokenizer is None or echoed is None else _offsets_in(echoed, context, tokenizer)
        self._num_asked = 0
        self._num_characters = len(echoed or "")

    def copy(self) -> Self:
        """One for another choice."""
        other = copy(self)
        other._stream = None if self._stream is None else self._stream.copy()
        return other

    def of(self, token_id: int) -> int:
        """The offset of the next token."""
        self._num_asked += 1
        if self._num_asked <= len(self._known):
            return self._known[self._num_asked - 1]
        offset = self._num_characters
        if self._stream is not None:
            self._num_characters += len(self._stream.push(token_id))
        return offset


def _offsets_in(text: str, token_ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """Where the tokens of a prompt begin in its text. Special ones take room where the text spells them out.

    Those that the tokenizer adds do not.
    """
    stream = TextStream(tokenizer, [], skip_special_tokens=True)
    offsets, place = [], 0
    for token_id in token_ids:
        offsets.append(place)
        if token_id in tokenizer.special_token_ids:
            spelt = tokenizer.text_of(token_id)
            place += len(spelt) if text.startswith(spelt, place) else 0
        else:
            place += len(stream.push(token_id))
    return offsets


def text_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Entry | None],
    offsets: Offsets,
    tokenizer: Tokenizer | None,
    *,
    as_ids: bool = False,
) -> TextLogprobs:
    """Completions' form; the entry of a prompt's first token is None. With `as_ids` tokens are `token_id:7`."""
    tokens = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        if entry is not None:
            tokens.append(_spelling(token_id, None if as_ids else entry[token_id].decoded_token, tokenizer))
        else:
            tokens.append(_unpredicted(token_id, None if as_ids else tokenizer))
    return TextLogprobs(
        tokens=tokens,
        token_logprobs=[
            None if entry is None else _finite(entry[token_id])
            for token_id, entry in zip(token_ids, entries, strict=True)
        ],
        top_logprobs=[None if entry is None else _by_name(entry, tokenizer, as_ids) for entry in entries],
        text_offset=[offsets.of(token_id) for token_id in token_ids],
    )


def chat_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[Entry],
    num_top: int,
    tokenizer: Tokenizer | None,
    *,
    skip_special_tokens: bool,
    as_ids: bool = False,
) -> ChatLogprobs:
    """Chat's form. The bytes of all tokens together are those of the text. With `as_ids` tokens are `token_id:7`."""
    left_out = tokenizer.special_token_ids if tokenizer is not None and skip_special_tokens else frozenset[int]()

    def top(token_id: int, logprob: Logprob) -> TopLogprob:
        spelt = b"" if token_id in left_out else _bytes(token_id, logprob, tokenizer)
        known = None if spelt is None else list(spelt)
        name = f"token_id:{token_id}" if as_ids else _name(token_id, logprob)
        return TopLogprob.model_construct(token=name, logprob=_finite(logprob), bytes=known)  # there may be millions

    def token(token_id: int, entry: Entry) -> TokenLogprob:
        own = top(token_id, entry[token_id])
        others = [top(other, logprob) for other, logprob in _most_likely(entry, num_top)]
        return TokenLogprob.model_construct(token=own.token, logprob=own.logprob, bytes=own.bytes, top_logprobs=others)

    content = [token(token_id, entry) for token_id, entry in zip(token_ids, entries, strict=True)]
    return ChatLogprobs.model_construct(content=content)


def _most_likely(entry: Entry, num_top: int) -> list[tuple[int, Logprob]]:
    ranked = sorted(entry.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= num_top][:num_top]


def _bytes(token_id: int, logprob: Logprob, tokenizer: Tokenizer | None) -> bytes | None:
    """As the vocabulary has them, or else as the token's own text does, unless that is a part of a character."""
    found = None if tokenizer is None else tokenizer.token_bytes.of(token_id)
    text = logprob.decoded_token
    return text.encode() if found is None and text is not None and "\N{REPLACEMENT CHARACTER}" not in text else found


def _by_name(entry: Entry, tokenizer: Tokenizer | None, as_ids: bool) -> dict[str, float]:
    """By text; of several tokens that are written alike, the most likely one."""
    named: dict[str, float] = {}
    for token_id, logprob in entry.items():
        name = _spelling(token_id, None if as_ids else logprob.decoded_token, tokenizer)
        named[name] = max(named.get(name, LOWEST), _finite(logprob))
    return named


def _name(token_id: int, logprob: Logprob) -> str:
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token


def _unpredicted(token_id: int, tokenizer: Tokenizer | None) -> str:
    text = None if tokenizer is None else tokenizer.decode([token_id], skip_special_tokens=False)
    return _spelling(token_id, text, tokenizer)


def _spelling(token_id: int, text: str | None, tokenizer: Tokenizer | None) -> str:
    r"""A token in completions' form: its text, or as OpenAI writes what is not a whole character, `bytes:\xf0\x9f`."""
    if text is None:
        return f"token_id:{token_id}"
    spelt = None if tokenizer is None or "\N{REPLACEMENT CHARACTER}" not in text else tokenizer.token_bytes.of(token_id)
    if spelt is None or _is_whole(spelt):
        return text
    return "bytes:" + "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in spelt)


def _is_whole(spelt: bytes) -> bool:
    try:
        spelt.decode()
    except UnicodeDecodeError:
        return False
    return True


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, LOWEST)
