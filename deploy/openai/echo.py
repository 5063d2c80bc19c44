"""Repeats a prompt before its answer (`echo`)."""

from copy import copy
from typing import Self

from eagleray.cluster.frontend.prompts import TokensPrompt
from eagleray.cluster.frontend.text_stream import LOST, TextStream
from eagleray.cluster.frontend.tokenizer import Tokenizer


class Echo:
    """The text of a prompt, so that it and its choice's text are that of all tokens.

    Where a prompt's last tokens begin a character, a choice's first ones may complete it, which is then the choice's.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: TokensPrompt, *, skip_special_tokens: bool) -> None:
        ids, given = prompt["prompt_token_ids"], prompt.get("prompt")
        text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) if given is None else given
        self._stream = TextStream(tokenizer, ids, skip_special_tokens)
        self._open = self._stream.num_owed if given is None else 0
        self._certain = text[: len(text) - self._open]

    def copy(self) -> Self:
        """One for another choice."""
        other = copy(self)
        other._stream = self._stream.copy()
        return other

    def before(self, token_ids: list[int], *, ended: bool) -> str:
        """What of the prompt comes before the text of a choice's next tokens."""
        text, self._certain = self._certain, ""
        if self._open:
            for token_id in token_ids:
                self._stream.push(token_id)
            if ended:
                self._stream.flush()
            if self._stream.num_owed == 0:
                text += LOST * self._stream.num_kept
                self._open = 0
        return text
