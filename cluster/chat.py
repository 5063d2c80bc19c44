"""From a conversation to a prompt."""

from collections.abc import Sequence
from typing import Any

from eagleray.cluster.prompts import Message, TokensPrompt
from eagleray.cluster.tokenizer import Tokenizer


def chat_prompt(
    tokenizer: Tokenizer | None, messages: Sequence[Message], template_options: dict[str, Any]
) -> TokensPrompt:
    """A conversation as the text and the ids that the model was trained on. Raises `ValueError` if it cannot be."""
    if tokenizer is None:
        raise ValueError("there is no tokenizer, so no chat template; give token ids to `generate`")
    text = tokenizer.apply_chat_template(messages, **template_options)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}
