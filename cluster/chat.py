"""From a conversation to a prompt."""

from collections.abc import Callable, Sequence
from typing import Any

from eagleray.cluster.prompts import Message, TokensPrompt
from eagleray.cluster.tokenizer import Tokenizer


def any_text(_: str) -> None:
    """Nothing is wrong with it."""


def chat_prompt(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    template_options: dict[str, Any],
    check: Callable[[str], None] = any_text,
) -> TokensPrompt:
    """A conversation as the text and the ids that the model was trained on. Raises `ValueError` if it cannot be.

    `check` sees the text before its tokens, which take much longer, and may raise what it likes.
    """
    if tokenizer is None:
        raise ValueError("there is no tokenizer, so no chat template; give token ids to `generate`")
    text = tokenizer.apply_chat_template(messages, **template_options)
    check(text)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
