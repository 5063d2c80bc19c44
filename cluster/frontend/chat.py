"""Converts a conversation to a prompt with the model's chat template."""

from collections.abc import Iterable, Sequence
from typing import Any

from eagleray.cluster.frontend.prompts import Message, TokensPrompt
from eagleray.cluster.frontend.tokenizer import Tokenizer


def chat_prompt(
    tokenizer: Tokenizer | None, messages: Sequence[Message], template_options: dict[str, Any]
) -> TokensPrompt:
    """A conversation as the text and the ids that the model was trained on. Raises `ValueError` if it cannot be."""
    text = _known(tokenizer).apply_chat_template(with_texts(messages), **template_options)
    return _encoded(_known(tokenizer), text)


async def achat_prompt(
    tokenizer: Tokenizer | None, messages: Sequence[Message], template_options: dict[str, Any]
) -> TokensPrompt:
    """As `chat_prompt`, while others go on but for the tokens."""
    text = await _known(tokenizer).aapply_chat_template(with_texts(messages), **template_options)
    return _encoded(_known(tokenizer), text)


def _encoded(tokenizer: Tokenizer, text: str) -> TokensPrompt:
    """The text of a template, which has its special tokens."""
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def with_texts(messages: Sequence[Message]) -> list[Message]:
    """Messages whose contents may be lists of parts. Raises `ValueError` for parts that are not text."""
    return [
        {**message, "content": joined(_part(part) for part in message["content"])}
        if isinstance(message, dict) and isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def joined(texts: Iterable[str]) -> str:
    """The texts of a content's parts as one."""
    return "\n".join(texts)


def _part(part: object) -> str:
    match part:
        case str(text) | {"type": "text", "text": str(text)}:
            return text
        case _:
            raise ValueError(f'a message has the part {part!r:.200}; give texts or {{"type": "text", "text": …}}')


def _known(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise ValueError("there is no tokenizer, so no chat template; give token ids to `generate`")
    return tokenizer
