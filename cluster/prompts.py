"""What a prompt can be."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict


class TextPrompt(TypedDict):
    """Text, in a dict as vLLM has it."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, and the text they came from if the output should show it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt
Message = dict[str, Any]  # {"role": …, "content": …} and what else the chat template knows
