"""Token by token back to text: never half a character, and nothing of a stop string."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from eagleray.cluster.tokenizer import Tokenizer

CONTEXT_TOKENS = 8  # of the prompt: a tokenizer may strip the space before the first token that it sees


class TextStream:
    """Incremental decoding. Prompt text and output text together are the text of all tokens."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._backend = tokenizer.backend
        self._skip_special_tokens = skip_special_tokens
        self._skipped_ids = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._context = [i for i in prompt_token_ids[-CONTEXT_TOKENS:] if i not in self._skipped_ids]
        self._pending: list[int] = []  # tokens after `_context` whose text is not out yet
        for token_id in self._context:
            self._stream.step(self._backend, token_id)

    def push(self, token_id: int) -> str:
        """The text that becomes certain with this token: nothing while a character is incomplete."""
        if token_id in self._skipped_ids:  # it has no text, and would be decoded again with every later token
            return ""
        self._pending.append(token_id)
        text = self._step(token_id)
        if text is None:
            return ""
        self._context, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        """What `push` still holds back, an incomplete character as U+FFFD. Nothing may be pushed afterwards."""
        before, all_text = self._decode(self._context), self._decode(self._context + self._pending)
        return all_text[len(before) :] if all_text.startswith(before) else self._decode(self._pending)

    def _step(self, token_id: int) -> str | None:
        try:
            text: str | None = self._stream.step(self._backend, token_id)
        except Exception as error:  # the library raises nothing narrower
            if "Invalid prefix" not in str(error):
                raise
            # A token changed text that was out already: byte tokens that are no UTF-8 do, after ones that were.
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            text = "".join(self._stream.step(self._backend, pending) or "" for pending in self._pending)
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text


class Detokenizer:
    """One sequence's text, cut at the first stop string.

    The stop string completed first wins, of several completed by one character the longest: so the result does not
    depend on how the text was cut into tokens. `text` never holds what a stop string might still take back.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str] = (), *, keep_stop: bool = False) -> None:
        self._stream = stream
        self._stop = stop
        self._keep_stop = keep_stop
        self._decoded = ""
        self.text = ""  # what may be shown

    def push(self, token_id: int, *, may_stop: bool = True) -> str | None:
        """Take a token; the stop string that it completes, if `may_stop`, after which the sequence is over."""
        new = self._stream.push(token_id)
        if not new:
            return None
        old_length = len(self._decoded)
        self._decoded += new
        if self._stop and may_stop and (found := _first_stop(self._decoded, old_length, self._stop)):
            start, stop = found
            self.text = self._decoded[: start + len(stop) if self._keep_stop else start]
            return stop
        held = 0 if self._keep_stop else _held_back(self._decoded, self._stop)
        self.text = self._decoded[: len(self._decoded) - held]
        return None

    def flush(self) -> None:
        """The sequence ended without a stop string: show all of it."""
        self.text = self._decoded + self._stream.flush()


def _first_stop(text: str, old_length: int, stop: Sequence[str]) -> tuple[int, str] | None:
    """Start and text of the stop string that ends first after `old_length`."""
    starts = [(text.find(string, max(0, old_length - len(string) + 1)), string) for string in stop]
    found = [(start + len(string), start, string) for start, string in starts if start >= 0]
    if not found:
        return None
    _, start, string = min(found)
    return start, string


def _held_back(text: str, stop: Sequence[str]) -> int:
    """Length of the longest end of `text` that a stop string begins with."""
    return max((_overlap(text, string) for string in stop), default=0)


def _overlap(text: str, string: str) -> int:
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
