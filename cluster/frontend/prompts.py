"""The types that a prompt may have."""

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict, cast

Message = dict[str, Any]  # {"role": …, "content": …} and what else the chat template knows


class TextPrompt(TypedDict):
    """Text, in a dict as vLLM has it."""

    prompt: str


class TokensPrompt(TypedDict):
    """Token ids, and the text they came from if the output should show it."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


Prompt = str | Sequence[int] | TextPrompt | TokensPrompt


def prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list. A sequence that begins with a number is one prompt's token ids."""
    if isinstance(prompts, str | dict):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
        raise ValueError(f"prompts is {prompts!r}; give text, a list of token ids, or a list of those")
    several = cast(Sequence[Prompt], prompts)
    return [cast(Sequence[int], prompts)] if several and isinstance(several[0], int) else list(several)


def conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or several as a list."""
    if not messages or isinstance(messages[0], dict):
        return [cast(Sequence[Message], messages)]
    return list(cast(Sequence[Sequence[Message]], messages))


def num_to_take(truncate_prompt_tokens: int | None, max_model_len: int, num_new: int) -> int | None:
    """How many tokens of a prompt, the last ones, if more are to be generated; None for all."""
    return max(1, max_model_len - num_new) if truncate_prompt_tokens == -1 else truncate_prompt_tokens
